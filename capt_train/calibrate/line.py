"""Calibrate the top label by a line in log-odds (Platt scaling; arXiv 2107.08353)."""

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import Calibration, TopLabelMap
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate.top_label import fit_top_label

# Standard deviations of Gaussian priors on slope − 1 and on the offset (ours), as for the
# temperature: with a handful of images the line stays near the identity.
_SLOPE_DEVIATION, _OFFSET_DEVIATION = 0.5, 0.5
_LOWEST_SLOPE = 0.05
_NEWTON_STEPS = 50


def fit(raw: Floats, labels: Ints) -> Calibration:
    """Return a temperature and a line; see `fit_calibration`."""
    return fit_top_label(raw, labels, fit_line)


def fit_line(log_odds: Floats, correct: NDArray[np.bool_]) -> TopLabelMap:
    """Return ℓ' = aℓ + b with which σ(ℓ') explains best which images are right.

    Minimises the summed NLL plus (a−1)²/(2·0.5²) + b²/(2·0.5²), which is convex. Where confidence
    says nothing about being right, the slope is 0.05, with the best offset for it.

    Args:
        log_odds: (images,) of the most probable class.
        correct: (images,) whether that class is right.
    """
    ones = np.ones_like(log_odds)
    deviations = np.array([_SLOPE_DEVIATION, _OFFSET_DEVIATION])
    inputs = np.stack([log_odds, ones], axis=1)
    steeper, offset = _logistic_regression(inputs, log_odds, correct, deviations)
    slope = 1 + float(steeper)
    if slope < _LOWEST_SLOPE:
        slope = _LOWEST_SLOPE
        inputs = ones[:, np.newaxis]
        (offset,) = _logistic_regression(inputs, slope * log_odds, correct, deviations[1:])
    return TopLabelMap((0.0,), (float(offset),), slope, slope)


def _logistic_regression(
    inputs: Floats, base: Floats, correct: NDArray[np.bool_], deviations: Floats
) -> Floats:
    """Return the w with which σ(base + inputs·w) explains best which images are right.

    Newton's method with halved steps; w has Gaussian priors around 0 with these deviations.
    """
    sign, prior = np.where(correct, 1.0, -1.0), deviations**-2

    def cost(weights: Floats) -> float:
        margins = sign * (base + inputs @ weights)
        return float(np.logaddexp(0, -margins).sum() + (prior * weights**2).sum() / 2)

    weights = np.zeros(inputs.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = np.exp(-np.logaddexp(0, -(base + inputs @ weights)))
        gradient = inputs.T @ (chance - correct) + prior * weights
        curvature = inputs.T @ (inputs * (chance * (1 - chance))[:, np.newaxis]) + np.diag(prior)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while cost(weights - size * step) > cost(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return weights
