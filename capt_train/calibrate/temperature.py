"""Calibrate by a temperature (Guo et al., arXiv 1706.04599)."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.metrics.probabilities import Floats, Ints

LOWEST, HIGHEST = 0.05, 20.0  # of T
_PRECISION = 1e-6  # of log T
# Standard deviation of the prior on log T: a factor of 1.6 either way is nothing unusual.
PRIOR_DEVIATION = 0.5


def fit(raw: Floats, labels: Ints) -> Calibration:
    """Return the calibration with the best temperature; see `fit_calibration`."""
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    return Calibration(fit_temperature(torch.from_numpy(raw), targets))


def calibrated_nll(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> float:
    """Return the mean NLL at the temperature fitted on the same logits."""
    return float(calibrated_losses(logits, labels).mean())


def calibrated_losses(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return each image's NLL at the temperature fitted on the same logits."""
    scaled = logits / fit_temperature(logits, labels)
    return functional.cross_entropy(scaled, labels, reduction="none")


def fit_temperature(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> float:
    """Return the T > 0 with which softmax(z/T) explains the labels best.

    Minimises the summed NLL plus `(log T)²/(2·0.5²)`, a Gaussian prior (ours): a handful of images
    that are all right would otherwise drive T to 0 and every later confidence to 1. With a hundred
    and more images the prior hardly shows.

    With u = −log T the derivative is `e^u·Σ_i(Σ_c p_c z_c − z_y) + u/0.5²`; its root is bisected
    on T in [0.05, 20], so that there is no step size to choose.
    """
    exact = logits.double()
    target = float(exact.gather(1, labels[:, None]).sum())
    return _bisect(lambda u: _slope(exact, target, u) + u / PRIOR_DEVIATION**2)


def match_temperature(
    logits: Float[Tensor, "batch classes"], probabilities: Float[Tensor, "batch classes"]
) -> float:
    """Return the T > 0 with which softmax(z/T) is nearest to the probabilities of another model.

    Minimises the summed KL divergence from `probabilities` for the same images (ours). It needs no
    labels, and is 1 for `z = log probabilities`.
    """
    exact = logits.double()
    target = float((probabilities.double() * exact).sum())
    return _bisect(lambda u: _slope(exact, target, u))


def _slope(logits: Float[Tensor, "batch classes"], target: float, u: float) -> float:
    """Return the derivative of the summed cross-entropy of softmax(e^u·z) by u.

    `target` is the sum over images of z, weighted by the target probabilities.
    """
    beta = math.exp(u)
    expected = ((logits * beta).softmax(dim=1) * logits).sum()
    return beta * (float(expected) - target)


def _bisect(slope: Callable[[float], float]) -> float:
    """Return e^−u at the root of a slope that rises with u."""
    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
