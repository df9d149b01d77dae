"""Reliability data and curves against scikit-learn, the metrics they sum up to, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.metrics import calibration as metrics
from capt_deploy.metrics.reliability import (
    accuracy_coverage,
    calibrated_ece,
    classwise_reliability,
    reliability,
    risk_coverage,
)


def sample(seed: int, n: int = 300, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return metrics.softmax(2 * random.normal(size=(n, classes))), random.integers(0, classes, n)


def test_reliability_by_hand_with_certain_images_and_empty_bins() -> None:
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.875, 0.125], [0.5, 0.5]])
    found = reliability(probabilities, np.array([0, 0, 0, 0]), bins=4)
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.counts.tolist() == [0, 0, 1, 3]
    np.testing.assert_allclose(found.confidence, [np.nan, np.nan, 0.5, 2.875 / 3])
    np.testing.assert_allclose(found.accuracy, [np.nan, np.nan, 1, 2 / 3])


def test_classwise_reliability_by_hand_with_probability_zero() -> None:
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.75, 0.25]])
    found = classwise_reliability(probabilities, np.array([0, 0, 1]), bins=2)
    assert found.counts.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_allclose(found.confidence, [[0, 0.875], [0.125, 1]])
    np.testing.assert_allclose(found.accuracy, [[1, 0.5], [0.5, 0]])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 5), st.integers(1, 20))
def test_errors_are_what_the_diagrams_show(seed: int, n: int, classes: int, bins: int) -> None:
    probabilities, labels = sample(seed, n, classes)
    found = reliability(probabilities, labels, bins)
    assert found.counts.sum() == n
    error = np.nansum(found.counts * np.abs(found.accuracy - found.confidence)) / n
    expected = metrics.expected_calibration_error(probabilities, labels, bins)
    assert error == pytest.approx(expected, abs=1e-12)
    found = classwise_reliability(probabilities, labels, bins)
    assert found.counts.sum(axis=1).tolist() == [n] * classes
    error = np.nansum(found.counts * np.abs(found.accuracy - found.confidence)) / n / classes
    expected = metrics.classwise_calibration_error(probabilities, labels, bins)
    assert error == pytest.approx(expected, abs=1e-12)
    filled = found.counts > 0
    assert (np.isnan(found.confidence) == ~filled).all()
    low, high = (
        np.broadcast_to(part, filled.shape) for part in (found.edges[:-1], found.edges[1:])
    )
    inside = found.confidence[filled]
    assert ((low[filled] - 1e-12 <= inside) & (inside <= high[filled] + 1e-12)).all()


@pytest.mark.parametrize("seed", range(3))
def test_diagrams_equal_scikit_learn(seed: int) -> None:
    oracle = pytest.importorskip("sklearn.calibration", reason="scikit-learn is the oracle")
    probabilities, labels = sample(seed)
    top, classwise = (f(probabilities, labels, 10) for f in (reliability, classwise_reliability))
    right = (probabilities.argmax(axis=1) == labels).astype(int)
    rows = [(right, probabilities.max(axis=1), top.accuracy, top.confidence)]
    for index in range(4):
        own = (classwise.accuracy[index], classwise.confidence[index])
        rows.append(((labels == index).astype(int), probabilities[:, index], *own))
    for truth, said, *found in rows:
        expected = oracle.calibration_curve(truth, said, n_bins=10)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[~np.isnan(one)], other)


def test_one_class_and_one_image() -> None:
    found = classwise_reliability(np.ones((1, 1)), np.array([0]), bins=3)
    assert found.counts.tolist() == [[0, 0, 1]]
    assert found.accuracy[0, 2] == found.confidence[0, 2] == 1


def test_risk_by_hand() -> None:
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    coverage, risk = risk_coverage(probabilities, np.array([1, 0, 1, 0]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])
    same, accuracy = accuracy_coverage(probabilities, np.array([1, 0, 1, 0]))
    assert same.tolist() == coverage.tolist()
    np.testing.assert_allclose(accuracy, [1, 1 / 2, 2 / 3, 2 / 4])


def test_risk_within_a_tie_is_that_of_a_random_choice() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    for labels in ([0, 0, 1], [0, 1, 0]):
        _, risk = risk_coverage(probabilities, np.array(labels))
        np.testing.assert_allclose(risk, [0, 0.5 / 2, 1 / 3])


@pytest.mark.parametrize(("n", "points"), [(7, 3), (300, 200), (5, 200), (1000, 1), (1, 1)])
def test_points_are_even_and_end_with_all_images(n: int, points: int) -> None:
    probabilities, labels = sample(n, n)
    coverage, risk = risk_coverage(probabilities, labels, points)
    assert len(coverage) == len(risk) == min(n, points)
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(1 - metrics.accuracy(probabilities, labels))
    steps = np.diff(coverage * n, prepend=0)
    assert (steps >= 1 - 1e-9).all()
    assert steps.max() - steps.min() <= 1 + 1e-9


def test_the_area_under_all_points_is_aurc() -> None:
    probabilities, labels = sample(5)
    _, risk = risk_coverage(probabilities, labels, points=len(labels))
    expected = metrics.area_under_risk_coverage(probabilities, labels)
    assert risk.mean() == pytest.approx(expected)


def test_chance_alone_by_hand_for_one_image() -> None:
    # right with probability 0.8, and then 0.2 off; else wrong and 0.8 off
    mean, most = calibrated_ece(np.array([[0.8, 0.2]]), draws=4000)
    assert mean == pytest.approx(2 * 0.8 * 0.2, abs=0.02)
    assert most == pytest.approx(0.8)


def test_chance_alone_is_half_a_normal_distribution_for_many_images_in_one_bin() -> None:
    mean, most = calibrated_ece(np.tile([0.7, 0.3], (2000, 1)), draws=4000)
    deviation = math.sqrt(0.7 * 0.3 / 2000)
    assert mean == pytest.approx(deviation * math.sqrt(2 / math.pi), rel=0.05)
    assert most == pytest.approx(1.96 * deviation, rel=0.05)


def test_a_calibrated_model_is_below_the_quantile_and_an_overconfident_one_above() -> None:
    random = np.random.default_rng(0)
    honest = metrics.softmax(2 * random.normal(size=(1000, 5)))
    labels = (random.random((1000, 1)) > honest.cumsum(axis=1)).sum(axis=1).clip(max=4)
    assert metrics.expected_calibration_error(honest, labels) < calibrated_ece(honest)[1]
    boasting = metrics.softmax(2 * np.log(honest))
    error = metrics.expected_calibration_error(boasting, labels)
    assert error > calibrated_ece(boasting)[1]


def test_the_certain_have_no_noise_and_the_seed_decides() -> None:
    assert calibrated_ece(np.eye(3)) == (0, 0)
    assert calibrated_ece(np.ones((1, 1), np.float32)) == (0, 0)
    probabilities, _ = sample(0)
    assert calibrated_ece(probabilities) == calibrated_ece(probabilities)
    assert calibrated_ece(probabilities) != calibrated_ece(probabilities, seed=1)


@pytest.mark.parametrize(
    "function", [reliability, classwise_reliability, risk_coverage, accuracy_coverage]
)
@pytest.mark.parametrize(
    ("probabilities", "labels", "named"),
    [
        (np.array([[0.5, np.nan]]), np.array([0]), "NaN"),
        (np.array([[0.5, 0.6]]), np.array([0]), "sum to 1"),
        (np.array([[0.5, 0.5]]), np.array([2]), "labels of 2 classes"),
        (np.zeros((0, 2)), np.zeros(0, np.int64), "at least one"),
    ],
)
def test_what_has_no_metrics_has_no_diagram(
    function: object, probabilities: np.ndarray, labels: np.ndarray, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        function(probabilities, labels)  # type: ignore[operator]
    if not named.startswith("labels"):
        with pytest.raises(ValueError, match=named):
            calibrated_ece(probabilities)


def test_nothing_must_not_be_asked_for() -> None:
    probabilities, labels = sample(0)
    for call in (
        lambda: reliability(probabilities, labels, 0),
        lambda: classwise_reliability(probabilities, labels, 0),
        lambda: risk_coverage(probabilities, labels, 0),
        lambda: calibrated_ece(probabilities, bins=0),
        lambda: calibrated_ece(probabilities, draws=0),
    ):
        with pytest.raises(ValueError, match="at least one"):
            call()
