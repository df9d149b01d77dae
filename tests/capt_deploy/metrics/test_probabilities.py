"""What counts as probabilities and labels: rounding does, anything else does not."""

import numpy as np
import pytest

from capt_deploy.metrics.calibration import softmax
from capt_deploy.metrics.probabilities import require_both, require_labels, require_probabilities

ROW = np.array([[0.5, 0.5]])


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 20_000])
@pytest.mark.parametrize("precision", [np.float16, np.float32, np.float64])
def test_rows_rounded_to_any_precision_are_probabilities(classes: int, precision: type) -> None:
    random = np.random.default_rng(classes)
    for sharpness in (0.0, 1.0, 5.0):
        rows = softmax(sharpness * random.normal(size=(20, classes)))
        require_probabilities(rows.astype(precision))


def test_rows_rounded_as_bfloat16_are_probabilities() -> None:
    rows = softmax(np.random.default_rng(0).normal(size=(200, 50))).astype(np.float32)
    bits = rows.view(np.uint32)
    rounded = ((bits + 0x8000) & 0xFFFF0000).view(np.float32)  # the upper half of float32's bits
    assert np.abs(rounded.sum(axis=1) - 1).max() > 1e-4  # so that the test could fail
    require_probabilities(rounded)


def test_one_rounded_up_is_still_a_probability() -> None:
    require_probabilities(np.array([[np.nextafter(np.float32(1), np.float32(2)), 0]]))


@pytest.mark.parametrize(
    ("probabilities", "named"),
    [
        (np.array([[0.5, 0.5], [0.5, np.nan]]), "NaN"),
        (np.array([[np.inf, 0.0]]), "infinity"),
        (np.array([[np.inf, -np.inf]]), "infinity"),
        (np.array([[-0.1, 1.1]]), r"from 0 to 1, came -0\.1 to 1\.1"),
        (np.array([[-1e-9, 1.0]]), "from 0 to 1"),
        (np.array([[1.001, 0.0]]), r"from 0 to 1, came 0 to 1\.001"),
        (np.array([[0.5, 0.5], [0.5, 0.49]]), r"sum to 1, came a sum of 0\.99"),
        (np.array([[0.9, 0.9]]), r"sum to 1, came a sum of 1\.8"),
        (np.zeros((2, 3)), "sum to 1"),
        (np.array([[100.0, 0.0]]), "from 0 to 1"),
        (np.zeros((0, 2)), "at least one"),
        (np.zeros((2, 0)), "at least one"),
        (np.array([0.5, 0.5]), "samples, classes"),
    ],
)
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_what_is_no_distribution_is_refused(
    probabilities: np.ndarray, named: str, precision: type
) -> None:
    with pytest.raises(ValueError, match=named):
        require_probabilities(probabilities.astype(precision))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.array([2]), "labels of 2 classes, came 2 to 2"),
        (np.array([-1]), "labels of 2 classes, came -1"),
        (np.array([0, 1]), "as many labels"),
        (np.array([[0]]), "as many labels"),
        (np.array(0), "as many labels"),
        (np.array([0.0]), "whole numbers, came float64"),
        (np.array([True]), "whole numbers, came bool"),
    ],
)
def test_labels_that_are_no_columns_are_refused(labels: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        require_labels(ROW, labels)
    with pytest.raises(ValueError, match=named):
        require_both(ROW, labels)


def test_both_are_checked_together() -> None:
    require_both(ROW, np.array([1]))
    with pytest.raises(ValueError, match="sum to 1"):
        require_both(2 * ROW / 3, np.array([1]))
