"""Bins, diagrams and curves against scikit-learn, by hand, and with ties over all orders."""

import math
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.metrics import calibration as metrics
from capt_deploy.metrics.reliability import (
    TopLabels,
    bin_of,
    calibrated_ece,
    edges,
    reliability,
    risk_coverage,
    top_labels,
)


def exact_bin(value: float, bins: int) -> int:
    """Count the inner edges that are not above a value, in fractions."""
    inner = [Fraction(float(edge)) for edge in np.linspace(0, 1, bins + 1)[1:-1]]
    return bisect_right(inner, Fraction(float(value)))


@pytest.mark.parametrize("precision", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bins", [1, 2, 3, 10, 15, 49, 100])
def test_every_edge_and_its_neighbours_are_where_they_belong(bins: int, precision: type) -> None:
    near = np.linspace(0, 1, bins + 1).astype(precision)
    below, above = (np.nextafter(near, precision(side)) for side in (0, 1))
    values = np.concatenate([below, near, above])
    assert bin_of(values, bins).tolist() == [exact_bin(value, bins) for value in values]


def test_bins_of_what_is_known_by_heart() -> None:
    values = np.array([0.0, 0.1, 0.2, 0.3, 0.7, 0.999, 1.0])
    # 0.3 and 0.7 are a little below linspace's edges, 0.30000000000000004 and 0.7000000000000001
    assert bin_of(values, 10).tolist() == [0, 1, 2, 2, 6, 9, 9]
    assert bin_of(values.astype(np.float32), 10).tolist() == [0, 1, 2, 3, 6, 9, 9]
    assert bin_of(values, 1).tolist() == [0] * 7


def test_the_shape_of_the_values_is_kept() -> None:
    assert bin_of(np.array([[0.1, 0.9], [0.6, 0.4]]), 2).tolist() == [[0, 1], [1, 0]]


def test_there_must_be_a_bin() -> None:
    assert edges(1).tolist() == [0, 1]
    for bins in (0, -3):
        with pytest.raises(ValueError, match="at least one bin"):
            edges(bins)


def test_bins_of_the_top_label_by_hand() -> None:
    top = TopLabels(np.array([0.5, 0.75, 0.25, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]))
    found = top.reliability(4)
    assert found.counts.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(found.confidence, [np.nan, 0.25, 0.5, 1.75 / 2])
    np.testing.assert_allclose(found.accuracy, [np.nan, 0, 1, 1 / 2])
    assert top.ece(4) == (0.25 + 0.5 + 0.75) / 4


# few confidences, so that many are tied
TIED = st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1)


def of(images: list[tuple[float, bool]]) -> TopLabels:
    confidence, correct = zip(*images, strict=True)
    return TopLabels(np.array(confidence), np.array(correct, float))


def orders(images: list[tuple[float, bool]]) -> list[tuple[tuple[float, bool], ...]]:
    """Return all orders by rising confidence."""
    found = permutations(images)
    return [order for order in found if all(a[0] <= b[0] for a, b in pairwise(order))]


@settings(deadline=None, max_examples=40)
@given(TIED.filter(lambda images: len(images) <= 6))
def test_risk_is_the_mean_over_all_orders(images: list[tuple[float, bool]]) -> None:
    risks = []
    for order in orders(images):
        wrong = [not correct for _, correct in reversed(order)]
        risks.append([sum(wrong[:kept]) / kept for kept in range(1, len(wrong) + 1)])
    top = of(images)
    np.testing.assert_allclose(top.risk(), np.mean(risks, axis=0), atol=1e-12)
    assert top.aurc() == pytest.approx(np.mean(risks))


@settings(deadline=None, max_examples=40)
@given(TIED.filter(lambda images: len(images) <= 6), st.integers(1, 8))
def test_adaptive_bins_hold_what_all_orders_put_there(
    images: list[tuple[float, bool]], bins: int
) -> None:
    # per bin, what each order puts there: the signed gap is a mean over orders, the error is not
    gaps = np.zeros(bins)
    every = orders(images)
    for order in every:
        for rank, (confidence, correct) in enumerate(order):
            gaps[rank * bins // len(order)] += (correct - confidence) / len(every)
    expected = np.abs(gaps).sum() / len(images)
    assert of(images).adaptive_ece(bins) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(TIED, st.integers(1, 20), st.randoms(use_true_random=False))
def test_the_order_of_images_is_nothing_with_ties(
    images: list[tuple[float, bool]], bins: int, random: object
) -> None:
    one = of(images)
    random.shuffle(images)  # type: ignore[attr-defined]
    other = of(images)
    # these are sorted first: the same to the last bit
    assert one.aurc() == other.aurc()
    assert one.adaptive_ece(bins) == other.adaptive_ece(bins)
    assert one.ece(bins) == pytest.approx(other.ece(bins), abs=1e-12)
    assert one.accuracy() == pytest.approx(other.accuracy())


def test_a_tie_by_hand() -> None:
    top = of([(0.9, True), (0.6, True), (0.6, False), (0.6, False)])
    # of the three at 0.6 two are wrong: each place among them is wrong to two thirds
    np.testing.assert_allclose(top.risk(), [0, (2 / 3) / 2, (4 / 3) / 3, 2 / 4])
    # two bins of two images: {0.6, 0.6}, a third of each right, and {0.6, 0.9}
    low, high = 2 * (1 / 3 - 0.6), (1 / 3 - 0.6) + (1 - 0.9)
    assert top.adaptive_ece(2) == pytest.approx((abs(low) + abs(high)) / 4)


def test_all_in_one_tie_is_the_error_rate_at_any_coverage() -> None:
    top = of([(0.5, index < 3) for index in range(10)])
    np.testing.assert_allclose(top.risk(), 0.7)
    for bins in (1, 3, 10, 40):
        assert top.adaptive_ece(bins) == pytest.approx(0.2)


def test_one_image() -> None:
    for correct in (True, False):
        top = of([(0.75, correct)])
        for found in (top.ece(15), top.adaptive_ece(15)):
            assert found == pytest.approx(abs(correct - 0.75))
        assert top.aurc() == 1 - correct


def test_adaptive_bins_must_exist() -> None:
    with pytest.raises(ValueError, match="at least one bin"):
        of([(0.5, True)]).adaptive_ece(0)


def test_the_first_of_tied_classes_is_the_top_label() -> None:
    top = top_labels(np.full((2, 2), 0.5, np.float32), np.array([0, 1]))
    assert top.correct.tolist() == [1, 0]
    assert top.confidence.tolist() == [0.5, 0.5]
    assert top.confidence.dtype == np.float64


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


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 5), st.integers(1, 20))
def test_errors_are_what_the_diagrams_show(seed: int, n: int, classes: int, bins: int) -> None:
    probabilities, labels = sample(seed, n, classes)
    found = reliability(probabilities, labels, bins)
    assert found.counts.sum() == n
    error = np.nansum(found.counts * np.abs(found.accuracy - found.confidence)) / n
    expected = metrics.expected_calibration_error(probabilities, labels, bins)
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
    found = reliability(probabilities, labels, 10)
    right = (probabilities.argmax(axis=1) == labels).astype(int)
    expected = oracle.calibration_curve(right, probabilities.max(axis=1), n_bins=10)
    for ours, theirs in zip((found.accuracy, found.confidence), expected, strict=True):
        np.testing.assert_allclose(ours[~np.isnan(ours)], theirs)


def test_one_class_and_one_image() -> None:
    found = reliability(np.ones((1, 1)), np.array([0]), bins=3)
    assert found.counts.tolist() == [0, 0, 1]
    assert found.accuracy[2] == found.confidence[2] == 1


def test_risk_by_hand() -> None:
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    coverage, risk = risk_coverage(probabilities, np.array([1, 0, 1, 0]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])


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
    expected = top_labels(probabilities, labels).aurc()
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


@pytest.mark.parametrize("function", [reliability, risk_coverage])
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
        lambda: risk_coverage(probabilities, labels, 0),
        lambda: calibrated_ece(probabilities, bins=0),
        lambda: calibrated_ece(probabilities, draws=0),
    ):
        with pytest.raises(ValueError, match="at least one"):
            call()
