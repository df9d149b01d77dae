"""How many labels are wrong, as far as a model that was not tuned on them can tell."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_train.calibrate.temperature import fit_temperature
from capt_train.method.losses import noisy_likelihood, right_probabilities

_LOWEST, _HIGHEST = 0.05, 20.0  # of T
_PRIOR_DEVIATION = 0.5  # of log T, as in `calibration`
_COARSE, _FINE = 60, 30  # steps over log T
_LEAST = 0.02  # share below which a few odd images are no noisy hand
_MOST = 0.5  # share above which nobody would speak of a label any more
# Nats by which the labels must be likelier than with none wrong: with 4, chance does it twice in a
# thousand times (half of χ² with one degree of freedom, for the share is not negative).
_SURE = 4.0
_DEVIATIONS = 3.0  # by which the classes may differ more than by chance


@dataclass(frozen=True)
class LabelNoise:
    """Share of wrong labels, and the temperature that goes with it."""

    share: float  # ε, 0 to 0.5
    temperature: float


def fit_label_noise(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    share: float | None = None,
) -> LabelNoise:
    """Return the share of wrong labels and the temperature that explain the labels best (ours).

    A temperature fitted as if all labels were right takes every wrong one for a mistake of the
    model, and makes it doubt all that it says. Here a label may be wrong by chance as well: what a
    model that is sure of most of its right answers meets are a few labels that it finds as
    improbable as any. Maximised is `losses.noisy_likelihood` of z/T, with the prior that
    `fit_temperature` has on T. Where a share above 0 does not make the labels surely more likely,
    or is not spread evenly over the classes, it is 0, and the temperature `fit_temperature`'s.

    Labels that were confused with the likeliest other class are not found: to the model they look
    like images that it is unsure of.

    Args:
        logits: scaled, of images that the model was not tuned on.
        labels: perhaps wrong.
        share: of wrong ones, where it is known; then only the temperature is fitted.
    """
    plain = LabelNoise(0.0, fit_temperature(logits, labels))
    if share == 0 or not len(labels):
        return plain
    wide = logits.double()
    loss, log_temperature, found = _best(wide, labels, share)
    noisy = LabelNoise(found, math.exp(log_temperature))
    if share is not None:
        return noisy
    none = _loss(wide, labels, math.log(plain.temperature), 0.0)
    sure = none - loss > _SURE and found >= _LEAST
    # of two classes, the other one is also the likeliest
    told = logits.shape[1] > 2 and _even(wide / noisy.temperature, labels, found)
    return noisy if sure and told else plain


def _even(logits: Tensor, labels: Tensor, share: float) -> bool:
    """Tell whether the wrong labels may be spread over the classes by chance, by a χ² test.

    A class whose name says nothing to the model looks as if most of its labels were wrong, but
    then the model is.
    """
    wrong = 1 - right_probabilities(logits, labels, share)
    counts = labels.bincount()
    sums = labels.bincount(weights=wrong)[counts > 0]
    counts = counts[counts > 0]
    squares = (sums - share * counts).square() / (share * (1 - share) * counts)
    classes = len(counts)
    return float(squares.sum()) <= classes + _DEVIATIONS * math.sqrt(2 * classes)


def _best(logits: Tensor, labels: Tensor, share: float | None) -> tuple[float, float, float]:
    """Return the lowest loss, its log T and its share, by two grids over log T."""
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    step = (high - low) / _COARSE
    coarse = (low + step * place for place in range(_COARSE + 1))
    centre = min(_profile(logits, labels, u, share) for u in coarse)[1]
    fine = (centre + step * (2 * place / _FINE - 1) for place in range(_FINE + 1))
    return min(_profile(logits, labels, u, share) for u in fine)


def _profile(
    logits: Tensor, labels: Tensor, log_temperature: float, share: float | None
) -> tuple[float, float, float]:
    """Return the loss for this temperature, at the share that is given or the best one."""
    if share is not None:
        return _loss(logits, labels, log_temperature, share), log_temperature, share
    scaled = logits / math.exp(log_temperature)
    own = noisy_likelihood(scaled, labels, 0.0)
    slope = noisy_likelihood(scaled, labels, 1.0) - own  # of the likelihood by the share
    low, high = 0.0, _MOST
    for _ in range(30):  # the log-likelihood is concave in the share
        middle = (low + high) / 2
        rising = float((slope / (own + middle * slope)).sum()) > 0
        low, high = (middle, high) if rising else (low, middle)
    return _loss(logits, labels, log_temperature, low), log_temperature, low


def _loss(logits: Tensor, labels: Tensor, log_temperature: float, share: float) -> float:
    likelihood = noisy_likelihood(logits / math.exp(log_temperature), labels, share)
    tiny = torch.finfo(likelihood.dtype).tiny
    prior = log_temperature**2 / (2 * _PRIOR_DEVIATION**2)
    return prior - float(likelihood.clamp(min=tiny).log().sum())
