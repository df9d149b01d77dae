"""Intervals: as wide as theory has it, around their figure, and the same on both ways to them."""

import math

import numpy as np
import pytest

from capt_deploy.metrics import calibration as metrics
from capt_deploy.metrics.bootstrap import bootstrap_intervals, metric_intervals

FUNCTIONS = {
    "accuracy": metrics.accuracy,
    "ece_10": lambda p, y: metrics.expected_calibration_error(p, y, 10),
    "ece_15": metrics.expected_calibration_error,
    "adaptive_ece": metrics.adaptive_calibration_error,
    "classwise_ece": metrics.classwise_calibration_error,
    "brier": metrics.brier,
    "nll": metrics.negative_log_likelihood,
    "aurc": metrics.area_under_risk_coverage,
}


def calibrated(seed: int, n: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and labels that are drawn from them."""
    random = np.random.default_rng(seed)
    probabilities = metrics.softmax(2 * random.normal(size=(n, classes)))
    above = random.random((n, 1)) > probabilities.cumsum(axis=1)
    return probabilities, above.sum(axis=1).clip(max=classes - 1)


@pytest.mark.parametrize(("n", "classes"), [(200, 5), (50, 100), (3, 2), (1, 3), (10, 1)])
def test_reduced_images_have_the_intervals_of_whole_ones(n: int, classes: int) -> None:
    probabilities, labels = calibrated(n, n, classes)
    found = metric_intervals(probabilities, labels, resamples=30, seed=4)
    expected = bootstrap_intervals(probabilities, labels, FUNCTIONS, resamples=30, seed=4)
    assert list(found) == list(metrics.all_metrics(probabilities, labels))[:-1]
    for name in FUNCTIONS:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name


def test_no_class_above_the_first_bin_is_no_special_case() -> None:
    probabilities = np.full((6, 100), 0.01, np.float32)  # no cell but the first of each class
    labels = np.arange(6)
    found = metric_intervals(probabilities, labels, resamples=20)
    expected = bootstrap_intervals(probabilities, labels, FUNCTIONS, resamples=20)
    assert found["classwise_ece"] == pytest.approx(expected["classwise_ece"])


def test_the_interval_of_accuracy_is_as_wide_as_the_binomial_one() -> None:
    n, right = 1000, 800
    probabilities = np.tile([0.75, 0.25], (n, 1))
    labels = (np.arange(n) >= right).astype(np.int64)
    one = {"accuracy": metrics.accuracy}
    for level, deviations in ((0.95, 1.96), (0.8, 1.2816)):
        low, high = bootstrap_intervals(probabilities, labels, one, 2000, level)["accuracy"]
        half = deviations * math.sqrt(0.8 * 0.2 / n)
        assert low == pytest.approx(0.8 - half, abs=0.1 * half)
        assert high == pytest.approx(0.8 + half, abs=0.1 * half)


def test_nineteen_of_twenty_intervals_hold_the_true_accuracy() -> None:
    random = np.random.default_rng(0)
    probabilities, inside = np.tile([0.75, 0.25], (200, 1)), 0
    for seed in range(100):
        labels = (random.random(200) >= 0.7).astype(np.int64)
        one = {"accuracy": metrics.accuracy}
        low, high = bootstrap_intervals(probabilities, labels, one, 200, seed=seed)["accuracy"]
        inside += low <= 0.7 <= high
    assert 88 <= inside <= 99  # 95 ± 3 standard deviations, the most 99 as there are no halves


def test_an_ece_lies_inside_of_its_interval_although_noise_adds_to_it() -> None:
    for seed in range(20):
        probabilities, labels = calibrated(seed, 500)
        figures = metrics.all_metrics(probabilities, labels)
        for name, (low, high) in metric_intervals(probabilities, labels, 100, seed=seed).items():
            assert low <= figures[name] <= high, (seed, name)


def test_the_interval_of_ece_holds_what_it_is_for_other_images() -> None:
    usual = [
        metrics.expected_calibration_error(*calibrated(seed, 500)) for seed in range(1000, 1200)
    ]
    held = 0
    for seed in range(40):
        low, high = metric_intervals(*calibrated(seed, 500), 200)["ece_15"]
        held += low <= np.mean(usual) <= high
    assert held >= 34  # 39 do; of intervals that were not moved, 32


def test_no_share_is_moved_out_of_its_range() -> None:
    probabilities = np.tile([0.99, 0.01], (40, 1))
    labels = np.zeros(40, np.int64)
    assert metric_intervals(probabilities, labels, 50)["accuracy"] == (1, 1)
    labels[0] = 1
    for seed in range(10):
        for name, (low, high) in metric_intervals(probabilities, labels, 50, seed=seed).items():
            assert 0 <= low <= high, name
            assert name == "nll" or high <= 1, name


def test_seed_and_order_of_metrics_are_all_that_counts() -> None:
    probabilities, labels = calibrated(0, 60)
    one = bootstrap_intervals(probabilities, labels, FUNCTIONS, 20)
    backwards = dict(reversed(FUNCTIONS.items()))
    assert bootstrap_intervals(probabilities, labels, backwards, 20) == one
    assert bootstrap_intervals(probabilities, labels, FUNCTIONS, 20, seed=1) != one
    assert bootstrap_intervals(probabilities, labels, {}, 20) == {}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"resamples": 0}, "resample"),
        ({"level": 0.0}, "level"),
        ({"level": 1.0}, "level"),
        ({"level": math.nan}, "level"),
    ],
)
def test_impossible_intervals_are_refused(options: dict, named: str) -> None:
    probabilities, labels = calibrated(0, 10)
    with pytest.raises(ValueError, match=named):
        bootstrap_intervals(probabilities, labels, FUNCTIONS, **options)
    with pytest.raises(ValueError, match=named):
        metric_intervals(probabilities, labels, **options)


def test_what_has_no_metrics_has_no_intervals() -> None:
    for intervals in (metric_intervals, lambda p, y: bootstrap_intervals(p, y, FUNCTIONS)):
        with pytest.raises(ValueError, match="NaN"):
            intervals(np.array([[np.nan, 1.0]]), np.array([0]))
        with pytest.raises(ValueError, match="at least one"):
            intervals(np.zeros((0, 2)), np.zeros(0, np.int64))
