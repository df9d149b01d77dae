"""Every metric against its definition written out again, scikit-learn, and cases done by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.metrics import calibration as metrics
from capt_deploy.metrics.reliability import TopLabels, bin_of, top_labels


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
    assert top_labels(probabilities, labels).adaptive_ece(bins) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(cases)
def test_aurc_equals_its_definition(case: tuple) -> None:
    probabilities, labels = sample(*case)
    got = top_labels(probabilities, labels).aurc()
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bins", [10, 15])
def test_ece_equals_torchmetrics(seed: int, bins: int) -> None:
    torch = pytest.importorskip("torch", reason="torchmetrics takes its tensors")
    oracle = pytest.importorskip("torchmetrics.functional.classification", reason="the oracle")
    probabilities, labels = sample(seed)
    given = torch.from_numpy(probabilities), torch.from_numpy(labels)
    wanted = oracle.multiclass_calibration_error(*given, num_classes=5, n_bins=bins)
    got = metrics.expected_calibration_error(probabilities, labels, bins)
    assert got == pytest.approx(float(wanted), abs=1e-6)
    per_class = [
        float(oracle.binary_calibration_error(column, given[1] == index, n_bins=bins))
        for index, column in enumerate(given[0].T.contiguous())
    ]
    got = metrics.classwise_calibration_error(probabilities, labels, bins)
    assert got == pytest.approx(sum(per_class) / 5, abs=1e-6)


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


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4))
def test_order_of_samples_is_nothing_where_most_are_tied(seed: int, n: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    parts = random.multinomial(4, np.full(classes, 1 / classes), size=n) / 4
    labels = random.integers(0, classes, n)
    order = random.permutation(n)
    values = metrics.all_metrics(parts, labels)
    assert metrics.all_metrics(parts[order], labels[order]) == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize(("precision", "near"), [(np.float32, 1e-6), (np.float16, 3e-3)])
def test_fewer_digits_give_nearly_the_same(precision: type, near: float) -> None:
    probabilities, labels = sample(7, n=2000, sharpness=4.0)
    # a rounded probability may fall into the next bin, and an image's own one under float16's least
    own = probabilities[np.arange(2000), labels]
    probabilities, labels = probabilities[own > 1e-4], labels[own > 1e-4]
    values = metrics.all_metrics(probabilities, labels)
    rounded = metrics.all_metrics(probabilities.astype(precision), labels)
    assert rounded == pytest.approx(values, abs=near)


def test_probability_zero_of_the_label_is_finite_in_any_precision() -> None:
    for precision in (np.float16, np.float32, np.float64):
        values = metrics.all_metrics(np.array([[1, 0]], precision), np.array([1]))
        assert values["nll"] == pytest.approx(-math.log(np.finfo(np.float64).tiny))


def test_float32_is_measured_without_a_copy() -> None:
    random = np.random.default_rng(0)
    probabilities = random.random((100_000, 100), np.float32)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = random.integers(0, 100, len(probabilities))
    tracemalloc.start()
    try:
        metrics.all_metrics(probabilities, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < probabilities.nbytes / 2


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
    got = top_labels(probabilities, labels).adaptive_ece(2)
    assert got == pytest.approx((0.17 + 1.87) / 4)


def test_aurc_by_hand_rewards_errors_at_low_confidence() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    late = top_labels(probabilities, np.array([0, 0, 1])).aurc()
    early = top_labels(probabilities, np.array([1, 0, 0])).aurc()
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
        (np.array([[1.5, -0.5]]), np.array([0]), "from 0 to 1"),
        (np.array([[0.5, 0.6]]), np.array([0]), "sum to 1"),
        (np.array([[0.5, 0.5]]), np.array([2]), "labels of 2 classes"),
        (np.array([[0.5, 0.5]]), np.array([-1]), "labels of 2 classes"),
    ],
)
def test_what_has_no_metrics_is_refused(
    probabilities: np.ndarray, labels: np.ndarray, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        metrics.all_metrics(probabilities, labels)


MINED = [(0, 1), (2, 0)]


def test_recovery_and_breakage_by_hand() -> None:
    labels = np.array([0, 0, 0, 2, 1, 1, 2, 2])
    before = np.array([1, 1, 2, 0, 1, 1, 2, 2])
    after = np.array([0, 2, 0, 2, 1, 0, 0, 2])
    # errors in pairs: images 0, 1 and 3; image 2 is an error that was not mined
    found = metrics.confusion_recovery(labels, before, after, MINED, 3)
    assert found == metrics.Recovery(errors=3, recovered=2, right=4, broken=2)
    assert found.recovered_share == pytest.approx(2 / 3)
    assert found.broken_share == pytest.approx(2 / 4)


def test_shares_of_nothing_are_none() -> None:
    none = np.zeros(0, np.int64)
    found = metrics.confusion_recovery(none, none, none, MINED, 3)
    assert found == metrics.Recovery(0, 0, 0, 0)
    assert found.recovered_share is found.broken_share is None


def test_what_is_right_is_no_error_even_if_a_class_is_paired_with_itself() -> None:
    labels = np.array([0, 1])
    found = metrics.confusion_recovery(labels, labels, labels, [(0, 0), (1, 1)], 2)
    assert found == metrics.Recovery(0, 0, 2, 0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"after": np.array([0, 3])}, "labels of 3 classes"),
        ({"labels": np.array([-1, 0])}, "labels of 3 classes"),
    ],
)
def test_predictions_that_do_not_match_are_refused(changed: dict, named: str) -> None:
    same = {name: np.array([0, 1]) for name in ("labels", "before", "after")}
    with pytest.raises(ValueError, match=named):
        metrics.confusion_recovery(**{**same, "mined": MINED, "classes": 3, **changed})


def slow_class_gaps(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> np.ndarray:
    sums = np.zeros((2, probabilities.shape[1], bins))
    for row, label in zip(probabilities, labels, strict=True):
        for column, value in enumerate(row):
            sums[:, column, bin_of(np.array(value), bins)] += (value, column == label)
    return np.abs(sums[1] - sums[0])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 6), st.integers(1, 12))
def test_gaps_of_classes_equal_their_definition(
    seed: int, images: int, classes: int, bins: int
) -> None:
    random = np.random.default_rng(seed)
    probabilities = metrics.softmax(3 * random.normal(size=(images, classes))).astype(np.float32)
    labels = random.integers(0, classes, images)
    found = metrics.class_gaps(probabilities, labels, bins)
    np.testing.assert_allclose(found, slow_class_gaps(probabilities, labels, bins), atol=1e-12)


def test_gaps_over_several_blocks_are_those_of_the_columns() -> None:
    random = np.random.default_rng(0)
    probabilities = metrics.softmax(2 * random.normal(size=(70_000, 5))).astype(np.float32)
    labels = random.integers(0, 5, len(probabilities))
    gaps = metrics.class_gaps(probabilities, labels, 15)
    for column in range(5):
        own = TopLabels(probabilities[:, column].astype(float), (labels == column).astype(float))
        assert gaps[column].sum() / 70_000 == pytest.approx(own.ece(15))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_type_find_their_cell(kind: type) -> None:
    probabilities = np.full((2, 100), 0.01)
    gaps = metrics.class_gaps(probabilities, np.array([0, 99]).astype(kind), 15)
    assert (gaps[:, 0] > 0.5).nonzero()[0].tolist() == [0, 99]


def test_the_input_stays_as_it_was_whatever_its_layout() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 3))
    probabilities = np.asfortranarray(metrics.softmax(logits))
    before, labels = probabilities.copy(), np.zeros(40, np.int64)
    found = metrics.class_gaps(probabilities, labels, 4)
    np.testing.assert_array_equal(probabilities, before)
    np.testing.assert_array_equal(found, metrics.class_gaps(before.copy("C"), labels, 4))
