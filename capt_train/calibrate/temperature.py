"""Fit a temperature on logits that the tuning has not seen."""

import math
from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_LOWEST, _HIGHEST = 0.05, 20.0
# Standard deviation of the prior on log T: a factor of 1.6 either way is nothing unusual.
_PRIOR_DEVIATION = 0.5


def calibrated_nll(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> float:
    """Return the mean NLL at the temperature that would be fitted on these very logits."""
    return float(calibrated_losses(logits, labels).mean())


def calibrated_losses(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return each sample's NLL at that temperature."""
    scaled = logits / fit_temperature(logits, labels)
    return functional.cross_entropy(scaled, labels, reduction="none")


def fit_temperature(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> float:
    """Return the T > 0 with which softmax(z/T) explains the labels best.

    Minimises the summed NLL (Guo et al., arXiv 1706.04599) plus `(log T)²/(2·0.5²)`, a Gaussian
    prior (ours): a handful of images that are all right would otherwise drive T to 0 and every
    later confidence to 1; with a hundred and more it hardly shows.

    With u = −log T the derivative is `e^u·Σ_i(Σ_c p_c z_c − z_y) + u/0.5²`; its root is bisected
    on T in [0.05, 20], so that there is no step size to choose.
    """
    wide = logits.double()
    own = float(wide.gather(1, labels[:, None]).sum())
    return _bisect(lambda u: _slope(wide, own, u) + u / _PRIOR_DEVIATION**2)


def match_temperature(
    logits: Float[Tensor, "batch classes"], wanted: Float[Tensor, "batch classes"]
) -> float:
    """Return the T > 0 with which softmax(z/T) is nearest to other probabilities.

    Minimises the summed KL divergence from `wanted`, the same images' probabilities by a model
    whose confidence is to be kept (ours). It needs no labels, and with `z = log wanted` it is 1.
    """
    wide = logits.double()
    own = float((wanted.double() * wide).sum())
    return _bisect(lambda u: _slope(wide, own, u))


def _slope(logits: Float[Tensor, "batch classes"], own: float, u: float) -> float:
    """Return the derivative of `Σ_i −log softmax(e^u·z_i)` by u, `own` being Σ of the wanted z."""
    beta = math.exp(u)
    expected = ((logits * beta).softmax(dim=1) * logits).sum()
    return beta * (float(expected) - own)


def _bisect(slope: Callable[[float], float]) -> float:
    """Return e^−u at the root of a slope that rises with u."""
    low, high = -math.log(_HIGHEST), -math.log(_LOWEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
