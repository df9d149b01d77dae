"""Fit a map of the top label's log-odds on top of a temperature."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import Calibration, TopLabelMap, top_log_odds
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate import temperature

FitMap = Callable[[Floats, NDArray[np.bool_]], TopLabelMap]


def fit_top_label(raw: Floats, labels: Ints, fit_map: FitMap) -> Calibration:
    """Return a temperature and the map that `fit_map` returns.

    Args:
        raw: scaled logits z, (images, classes).
        labels: (images,) columns.
        fit_map: takes the log-odds of each image's most probable class, by the temperature, and
            whether that class is right, both (images,).
    """
    calibration = temperature.fit(raw, labels)
    log_odds = top_log_odds(calibration.scale(raw))
    return replace(calibration, top_label=fit_map(log_odds, raw.argmax(axis=1) == labels))
