"""Calibrate the top label by isotonic regression (Zadrozny & Elkan 2002), joined by lines."""

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import Calibration, TopLabelMap
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate.top_label import fit_top_label

_NARROWEST = 0.25  # between two knots; a steeper rise would magnify rounding errors of logits


def fit(raw: Floats, labels: Ints) -> Calibration:
    """Return a temperature and an isotonic map; see `fit_calibration`."""
    return fit_top_label(raw, labels, fit_isotonic)


def fit_isotonic(log_odds: Floats, correct: NDArray[np.bool_]) -> TopLabelMap:
    """Return the monotone map through the accuracy of the blocks of isotonic regression.

    A block of n images of which k are right counts as (k+1)/(n+2), so that no confidence becomes 0
    or 1, and blocks that nearly touch are merged (ours). Lines in log-odds join the blocks, and the
    slope outside of them is 1.

    Args:
        log_odds: (images,) of the most probable class, at least one.
        correct: (images,) whether that class is right.
    """
    from sklearn.isotonic import IsotonicRegression

    levels = IsotonicRegression().fit_transform(log_odds, correct.astype(np.float64))
    _, block = np.unique(levels, return_inverse=True)
    columns = (np.ones(len(block)), correct, log_odds)
    sums = np.array([np.bincount(block, column) for column in columns], np.float64)
    images, right, odds = _merge_near_blocks(sums)
    share = (right + 1) / (images + 2)
    values = np.maximum.accumulate(np.log(share / (1 - share)))
    return TopLabelMap(tuple((odds / images).tolist()), tuple(values.tolist()), 1.0, 1.0)


def _merge_near_blocks(sums: Floats) -> Floats:
    """Return the sums of images, right images and log-odds, (3, blocks), near blocks merged."""
    merged = [sums[:, 0]]
    for block in sums.T[1:]:
        if block[2] / block[0] - merged[-1][2] / merged[-1][0] < _NARROWEST:
            merged[-1] = merged[-1] + block
        else:
            merged.append(block)
    return np.stack(merged, axis=1)
