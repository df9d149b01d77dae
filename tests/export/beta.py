"""Calibrate the top label by beta calibration (Kull, Silva Filho & Flach 2017).

A calibrator that capt does not have: the worked example of CONTRIBUTING for adding one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from capt_deploy.confidence.calibration import Calibration, TopLabelMap
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate.top_label import fit_top_label
from capt_train.calibrators import Calibrator

ENTRY = Calibrator("beta", "a temperature, and a beta curve", module="tests.export.beta")

_DEVIATION = 0.5  # of Gaussian priors on a − 1, b − 1 and c
_KNOTS = np.linspace(-12, 12, 97)  # log-odds at which the curve is sampled


def fit(raw: Floats, labels: Ints) -> Calibration:
    """Return a temperature and a beta curve; see `fit_calibration`."""
    return fit_top_label(raw, labels, fit_beta)


def curve(log_odds: Floats, a: float, b: float, c: float) -> Floats:
    """Return the log-odds a·ln p − b·ln(1 − p) + c of beta calibration."""
    return np.asarray(c - a * np.logaddexp(0, -log_odds) + b * np.logaddexp(0, log_odds))


def fit_beta(log_odds: Floats, correct: NDArray[np.bool_]) -> TopLabelMap:
    """Return the curve with a, b ≥ 0 that explains best which images are right."""
    sign, identity = np.where(correct, 1.0, -1.0), np.array([1.0, 1.0, 0.0])

    def cost(values: Floats) -> float:
        losses = np.logaddexp(0, -sign * curve(log_odds, *values))
        return float(losses.sum() + ((values - identity) ** 2).sum() / (2 * _DEVIATION**2))

    a, b, c = minimize(cost, identity, bounds=((0, None), (0, None), (None, None))).x
    # It is a line far out: ln p → log-odds on the left, −ln(1 − p) → log-odds on the right.
    values = np.maximum.accumulate(curve(_KNOTS, a, b, c))
    return TopLabelMap(tuple(_KNOTS.tolist()), tuple(values.tolist()), float(a), float(b))
