"""Every metric against its definition written out again, scikit-learn, and cases done by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy import metrics


def sample(seed: int, n: int = 200, classes: int = 5, sharpness: float = 2.0) -> tuple:
    random = np.random.default_rng(seed)
    logits = sharpness * random.normal(size=(n, classes))
    return metrics.softmax(logits), random.integers(0, classes, n)


def best(row: np.ndarray) -> int:
    return max(range(len(row)), key=lambda index: (row[index], -index))


def slow_bin_error(confidences: list[float], hits: list[float], bins: int) -> float:
    """Guo et al., equation 3: the bins' |accuracy - confidence|, weighted by their share."""
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        last = number == bins - 1
        inside = [i for i, c in enumerate(confidences) if low <= c < high or (last and c == high)]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


def slow_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    tops = [best(row) for row in probabilities]
    confidences = [float(row[top]) for row, top in zip(probabilities, tops, strict=True)]
    hits = [float(top == label) for top, label in zip(tops, labels, strict=True)]
    return slow_bin_error(confidences, hits, bins)


def slow_classwise(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    errors = []
    for index in range(probabilities.shape[1]):
        hits = [float(label == index) for label in labels]
        errors.append(slow_bin_error([float(p) for p in probabilities[:, index]], hits, bins))
    return sum(errors) / len(errors)


def slow_adaptive(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    rows = sorted(
        (float(row.max()), float(best(row) == label))
        for row, label in zip(probabilities, labels, strict=True)
    )
    assert len(rows) % bins == 0, "the definition is only unique where bins come out even"
    size = len(rows) // bins
    total = 0.0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        total += abs(sum(hit - confidence for confidence, hit in part)) / len(rows)
    return total


def slow_aurc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    rows = sorted(
        (-float(row.max()), float(best(row) != label))
        for row, label in zip(probabilities, labels, strict=True)
    )
    risks = [sum(wrong for _, wrong in rows[:kept]) / kept for kept in range(1, len(rows) + 1)]
    return sum(risks) / len(risks)


cases = st.tuples(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6), st.floats(0.1, 3))


@settings(deadline=None, max_examples=60)
@given(cases, st.integers(1, 20))
def test_calibration_errors_equal_their_definitions(case: tuple, bins: int) -> None:
    probabilities, labels = sample(*case)
    for fast, slow in (
        (metrics.expected_calibration_error, slow_ece),
        (metrics.classwise_calibration_error, slow_classwise),
    ):
        assert fast(probabilities, labels, bins) == pytest.approx(slow(probabilities, labels, bins))


@pytest.mark.parametrize(("n", "bins"), [(60, 15), (200, 10), (15, 15), (8, 1)])
def test_adaptive_error_equals_its_definition(n: int, bins: int) -> None:
    probabilities, labels = sample(n, n)
    expected = slow_adaptive(probabilities, labels, bins)
    assert metrics.adaptive_calibration_error(probabilities, labels, bins) == pytest.approx(
        expected
    )


@settings(deadline=None, max_examples=60)
@given(cases)
def test_aurc_equals_its_definition(case: tuple) -> None:
    probabilities, labels = sample(*case)
    got = metrics.area_under_risk_coverage(probabilities, labels)
    assert got == pytest.approx(slow_aurc(probabilities, labels))


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_brier_and_log_loss_equal_scikit_learn(seed: int) -> None:
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle")
    probabilities, labels = sample(seed)
    assert metrics.accuracy(probabilities, labels) == pytest.approx(
        reference.accuracy_score(labels, probabilities.argmax(1))
    )
    assert metrics.negative_log_likelihood(probabilities, labels) == pytest.approx(
        reference.log_loss(labels, probabilities, labels=range(5))
    )
    per_class = [
        reference.brier_score_loss(labels == index, probabilities[:, index]) for index in range(5)
    ]
    assert metrics.brier(probabilities, labels) == pytest.approx(sum(per_class))


@settings(deadline=None, max_examples=60)
@given(cases)
def test_every_share_stays_in_its_range_and_order_of_samples_is_nothing(case: tuple) -> None:
    probabilities, labels = sample(*case)
    values = metrics.all_metrics(probabilities, labels)
    shares = {"accuracy", "ece_10", "ece_15", "adaptive_ece", "classwise_ece", "aurc"}
    assert all(0 <= values[key] <= 1 for key in shares)
    assert 0 <= values["brier"] <= 2
    assert values["nll"] >= 0
    order = np.random.default_rng(1).permutation(len(labels))
    assert metrics.all_metrics(probabilities[order], labels[order]) == pytest.approx(values)


def test_all_metrics_has_the_keys_of_the_contract_and_the_stated_bins() -> None:
    probabilities, labels = sample(3)
    values = metrics.all_metrics(probabilities, labels)
    assert list(values) == [
        "accuracy",
        "ece_10",
        "ece_15",
        "adaptive_ece",
        "classwise_ece",
        "brier",
        "nll",
        "aurc",
        "n",
    ]
    assert values["ece_10"] == pytest.approx(slow_ece(probabilities, labels, 10))
    assert values["ece_15"] == pytest.approx(slow_ece(probabilities, labels, 15))
    assert values["classwise_ece"] == pytest.approx(slow_classwise(probabilities, labels, 15))
    assert values["n"] == 200
    assert all(type(value) in (float, int) for value in values.values())


def test_certain_and_right_is_perfect() -> None:
    values = metrics.all_metrics(np.eye(3)[[0, 1, 2, 1]], np.array([0, 1, 2, 1]))
    assert values.pop("accuracy") == 1
    assert values.pop("n") == 4
    assert all(value == 0 for value in values.values())


def test_certain_and_wrong_is_as_bad_as_it_gets() -> None:
    values = metrics.all_metrics(np.eye(2)[[0, 1]], np.array([1, 0]))
    assert values["accuracy"] == 0
    assert values["ece_10"] == values["ece_15"] == values["adaptive_ece"] == values["aurc"] == 1
    # in either column one sample of probability 1 and one of 0 is wrong
    assert values["classwise_ece"] == 1
    assert values["brier"] == 2
    assert values["nll"] == pytest.approx(-math.log(np.finfo(np.float64).tiny))


def test_confidence_one_shares_the_last_bin_with_what_is_just_below() -> None:
    probabilities = np.array([[1.0, 0.0], [0.95, 0.05]])
    # one bin: |1 right - 1.95 confidence| / 2; two bins would give (0 + 0.95) / 2 or (1 + 0.05) / 2
    got = metrics.expected_calibration_error(probabilities, np.array([0, 1]), bins=10)
    assert got == pytest.approx(0.95 / 2)
    got = metrics.expected_calibration_error(probabilities, np.array([1, 0]), bins=10)
    assert got == pytest.approx(0.95 / 2)


def test_an_edge_belongs_to_the_bin_above_it() -> None:
    # 0.5 and 0.6 share [0.5, 1.0] of two bins: right and wrong cancel to |1 - 1.1| / 2
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4]])
    got = metrics.expected_calibration_error(probabilities, np.array([0, 1]), bins=2)
    assert got == pytest.approx(0.05)


def test_empty_bins_count_nothing() -> None:
    probabilities = np.tile([0.75, 0.25], (4, 1))
    labels = np.array([0, 0, 0, 1])
    for bins in (2, 10, 1000):
        assert metrics.expected_calibration_error(probabilities, labels, bins) == 0


def test_adaptive_bins_split_by_rank_where_equal_widths_hold_all_in_one() -> None:
    probabilities = np.array([[0.91, 0.09], [0.92, 0.08], [0.93, 0.07], [0.94, 0.06]])
    labels = np.array([0, 0, 1, 1])
    assert metrics.expected_calibration_error(probabilities, labels, 2) == pytest.approx(1.7 / 4)
    got = metrics.adaptive_calibration_error(probabilities, labels, 2)
    assert got == pytest.approx((0.17 + 1.87) / 4)


def test_aurc_by_hand_rewards_errors_at_low_confidence() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    late = metrics.area_under_risk_coverage(probabilities, np.array([0, 0, 1]))
    early = metrics.area_under_risk_coverage(probabilities, np.array([1, 0, 0]))
    assert late == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert early == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_one_class_is_always_right_and_certain() -> None:
    values = metrics.all_metrics(np.ones((3, 1)), np.zeros(3, np.int64))
    assert values["accuracy"] == 1
    assert values["ece_15"] == values["brier"] == values["nll"] == values["aurc"] == 0


def test_softmax_is_exact_shift_invariant_and_safe_for_huge_logits() -> None:
    np.testing.assert_allclose(metrics.softmax(np.log([[1.0, 2.0, 5.0]])), [[0.125, 0.25, 0.625]])
    huge = metrics.softmax(np.array([[1e4, 1e4 + math.log(3)]], dtype=np.float64))
    np.testing.assert_allclose(huge, [[0.25, 0.75]])
    assert metrics.softmax(np.zeros((1, 2), np.float16)).dtype == np.float64


@pytest.mark.parametrize(
    ("probabilities", "labels", "named"),
    [
        (np.array([[0.5, np.nan]]), np.array([0]), "NaN"),
        (np.array([[np.inf, 0.0]]), np.array([0]), "finite"),
        (np.zeros((0, 2)), np.zeros(0, np.int64), "at least one"),
        (np.full((2, 2), 0.5), np.array([0]), "as many labels"),
        (np.array([0.5, 0.5]), np.array([0, 1]), "samples, classes"),
        (np.array([[0.5, 0.5]]), np.array([2]), "labels of 2 classes"),
        (np.array([[0.5, 0.5]]), np.array([-1]), "labels of 2 classes"),
    ],
)
def test_what_has_no_metrics_is_refused(
    probabilities: np.ndarray, labels: np.ndarray, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        metrics.all_metrics(probabilities, labels)
