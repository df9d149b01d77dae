"""Estimate how many labels are wrong, from a model that was not tuned on them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.metrics.probabilities import Ints
from capt_train.calibrate.temperature import HIGHEST, LOWEST, PRIOR_DEVIATION, fit_temperature
from capt_train.method.losses import noisy_likelihood, right_probabilities

_COARSE, _FINE = 60, 30  # steps over log T
_LOWEST_SHARE, _HIGHEST_SHARE = 0.02, 0.5  # fewer may be a few odd images
# Nats by which the labels must be likelier than with none wrong. Chance exceeds 4 twice in a
# thousand times (half of χ² with one degree of freedom, since the share is not negative).
_SIGNIFICANT = 4.0
_DEVIATIONS = 3.0  # of χ², by which the classes may differ more than by chance


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

    A temperature fitted as if all labels were right blames the model for every wrong label, and
    lowers all confidences. Here a label may also be wrong by chance: a sure model then finds a few
    labels as improbable as any other. Maximises `losses.noisy_likelihood` of z/T, with the prior on
    T of `fit_temperature`. The share is 0 where a higher one does not make the labels significantly
    more likely, or where the wrong labels are not spread evenly over the classes.

    Images labelled as the second most probable class are not recognised: to the model they look
    like images that it is unsure of.

    Args:
        logits: scaled, of images that the model was not tuned on.
        labels: some of which may be wrong.
        share: of wrong labels where it is known; then only the temperature is fitted.
    """
    plain = LabelNoise(0.0, fit_temperature(logits, labels))
    if share == 0 or not len(labels):
        return plain
    exact = logits.double()
    loss, log_temperature, best_share = _best(exact, labels, share)
    noisy = LabelNoise(best_share, math.exp(log_temperature))
    if share is not None:
        return noisy
    loss_without_noise = _loss(exact, labels, math.log(plain.temperature), 0.0)
    if loss_without_noise - loss <= _SIGNIFICANT or best_share < _LOWEST_SHARE:
        return plain
    # With two classes, a wrong label is always the second most probable class.
    if logits.shape[1] < 3 or not _is_even(exact / noisy.temperature, labels, best_share):
        return plain
    return noisy


def fit_temperature_to_noisy_labels(
    raw: NDArray[np.floating], labels: Ints, share: float
) -> Calibration:
    """Return the calibration with the best temperature where a known share of labels is wrong.

    Args:
        raw: scaled logits z, (images, classes).
        labels: (images,) columns.
        share: of wrong labels, above 0.
    """
    logits, targets = torch.from_numpy(np.asarray(raw, np.float64)), torch.tensor(labels)
    noise = fit_label_noise(logits, targets, share)
    return Calibration(noise.temperature, label_noise=share)


def _is_even(logits: Tensor, labels: Tensor, share: float) -> bool:
    """Return whether the wrong labels may be spread over the classes by chance, by a χ² test.

    A class whose name means nothing to the model looks as if most of its labels were wrong.
    """
    wrong = 1 - right_probabilities(logits, labels, share)
    counts = labels.bincount()
    sums = labels.bincount(weights=wrong)[counts > 0]
    counts = counts[counts > 0]
    squares = (sums - share * counts).square() / (share * (1 - share) * counts)
    classes = len(counts)
    return float(squares.sum()) <= classes + _DEVIATIONS * math.sqrt(2 * classes)


def _best(logits: Tensor, labels: Tensor, share: float | None) -> tuple[float, float, float]:
    """Return the lowest loss with its log T and share, by two grids over log T."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    step = (high - low) / _COARSE
    coarse = (low + step * place for place in range(_COARSE + 1))
    centre = min(_profile(logits, labels, u, share) for u in coarse)[1]
    fine = (centre + step * (2 * place / _FINE - 1) for place in range(_FINE + 1))
    return min(_profile(logits, labels, u, share) for u in fine)


def _profile(
    logits: Tensor, labels: Tensor, log_temperature: float, share: float | None
) -> tuple[float, float, float]:
    """Return the loss, log T and the share: the given one, or the best one for this T."""
    if share is not None:
        return _loss(logits, labels, log_temperature, share), log_temperature, share
    scaled = logits / math.exp(log_temperature)
    clean = noisy_likelihood(scaled, labels, 0.0)
    slope = noisy_likelihood(scaled, labels, 1.0) - clean  # of the likelihood by the share
    low, high = 0.0, _HIGHEST_SHARE
    for _ in range(30):  # the log-likelihood is concave in the share
        middle = (low + high) / 2
        rising = float((slope / (clean + middle * slope)).sum()) > 0
        low, high = (middle, high) if rising else (low, middle)
    return _loss(logits, labels, log_temperature, low), log_temperature, low


def _loss(logits: Tensor, labels: Tensor, log_temperature: float, share: float) -> float:
    likelihood = noisy_likelihood(logits / math.exp(log_temperature), labels, share)
    tiny = torch.finfo(likelihood.dtype).tiny
    prior = log_temperature**2 / (2 * PRIOR_DEVIATION**2)
    return prior - float(likelihood.clamp(min=tiny).log().sum())
