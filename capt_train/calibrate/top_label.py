"""Fit a map of the top label's log-odds; see `capt_deploy.confidence.top_label`."""

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.top_label import TopLabelMap
from capt_deploy.metrics.calibration import Floats

# Standard deviations of Gaussian priors, on slope − 1 and on the offset (ours), as for the
# temperature: with a handful of images the line stays near the identity.
_SLOPE_DEVIATION, _OFFSET_DEVIATION = 0.5, 0.5
_FLATTEST = 0.05
_NEWTON_STEPS = 50
_NARROWEST = 0.25  # between two knots; a steeper rise would magnify what rounding does to logits
_Bools = NDArray[np.bool_]


def fit_line(log_odds: Floats, correct: _Bools) -> TopLabelMap:
    """Return ℓ' = aℓ + b with which σ(ℓ') explains best what was right (Platt scaling).

    Minimises the summed NLL plus (a−1)²/(2·0.5²) + b²/(2·0.5²), which is convex. Confidence that
    says nothing of what is right gets a slope of 0.05, and the offset that is best with it.

    Args:
        log_odds: (images,) of the most probable class.
        correct: (images,) whether that was right.
    """
    ones = np.ones_like(log_odds)
    deviations = np.array([_SLOPE_DEVIATION, _OFFSET_DEVIATION])
    steeper, offset = _fit(np.stack([log_odds, ones], axis=1), log_odds, correct, deviations)
    slope = 1 + float(steeper)
    if slope < _FLATTEST:
        slope = _FLATTEST
        (offset,) = _fit(ones[:, np.newaxis], slope * log_odds, correct, deviations[1:])
    return TopLabelMap((0.0,), (float(offset),), slope, slope)


def _fit(inputs: Floats, given: Floats, correct: _Bools, deviations: Floats) -> Floats:
    """Return the w with which σ(given + inputs·w) explains best what was right.

    By Newton's method with halved steps; w has Gaussian priors around 0 with these deviations.
    """
    sign, prior = np.where(correct, 1.0, -1.0), deviations**-2

    def cost(weights: Floats) -> float:
        margins = sign * (given + inputs @ weights)
        return float(np.logaddexp(0, -margins).sum() + (prior * weights**2).sum() / 2)

    found = np.zeros(inputs.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = np.exp(-np.logaddexp(0, -(given + inputs @ found)))
        gradient = inputs.T @ (chance - correct) + prior * found
        curvature = inputs.T @ (inputs * (chance * (1 - chance))[:, np.newaxis]) + np.diag(prior)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while cost(found - size * step) > cost(found) and size > 1e-6:
            size /= 2
        found = found - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return found


def fit_isotonic(log_odds: Floats, correct: _Bools) -> TopLabelMap:
    """Return the monotone map through the accuracy of the blocks of isotonic regression.

    A block of n images of which k are right counts as (k+1)/(n+2), so that no confidence becomes 0
    or 1, and blocks that nearly touch are one (ours). They are joined by lines in log-odds, and
    outside of them the slope is 1.

    Args:
        log_odds: (images,) of the most probable class, at least one.
        correct: (images,) whether that was right.
    """
    from sklearn.isotonic import IsotonicRegression

    levels = IsotonicRegression().fit_transform(log_odds, correct.astype(np.float64))
    _, block = np.unique(levels, return_inverse=True)
    added = (np.bincount(block, own) for own in (np.ones(len(block)), correct, log_odds))
    sums = np.array([*added], np.float64)
    images, right, odds = _apart(sums)
    share = (right + 1) / (images + 2)
    values = np.maximum.accumulate(np.log(share / (1 - share)))
    return TopLabelMap(tuple((odds / images).tolist()), tuple(values.tolist()), 1.0, 1.0)


def _apart(sums: Floats) -> Floats:
    """Add up blocks, (3, blocks) of images, right ones and log-odds, whose means nearly touch."""
    kept = [sums[:, 0]]
    for own in sums.T[1:]:
        if own[2] / own[0] - kept[-1][2] / kept[-1][0] < _NARROWEST:
            kept[-1] = kept[-1] + own
        else:
            kept.append(own)
    return np.stack(kept, axis=1)
