"""Which bin a probability is in, to the last bit, and sums over many images at once."""

from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.metrics.bins import bin_of, class_sums, edges, top_sums
from capt_deploy.metrics.calibration import softmax


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


def test_sums_of_the_top_label_by_hand() -> None:
    sums = top_sums(np.array([0.5, 0.75, 0.25, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]), 4)
    assert sums.counts.tolist() == [0, 1, 1, 2]
    assert sums.confidence.tolist() == [0, 0.25, 0.5, 1.75]
    assert sums.right.tolist() == [0, 0, 1, 1]
    assert sums.gaps().tolist() == [0, 0.25, 0.5, 0.75]


def slow_class_sums(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> np.ndarray:
    sums = np.zeros((3, probabilities.shape[1], bins))
    for row, label in zip(probabilities, labels, strict=True):
        for column, value in enumerate(row):
            sums[:, column, exact_bin(value, bins)] += (1, value, column == label)
    return sums


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 6), st.integers(1, 12))
def test_sums_of_classes_equal_their_definition(
    seed: int, images: int, classes: int, bins: int
) -> None:
    random = np.random.default_rng(seed)
    probabilities = softmax(3 * random.normal(size=(images, classes))).astype(np.float32)
    labels = random.integers(0, classes, images)
    sums = class_sums(probabilities, labels, bins)
    found = np.stack([sums.counts, sums.confidence, sums.right])
    np.testing.assert_allclose(found, slow_class_sums(probabilities, labels, bins), atol=1e-12)


def test_sums_over_several_blocks_are_those_of_the_columns() -> None:
    random = np.random.default_rng(0)
    probabilities = softmax(2 * random.normal(size=(70_000, 5))).astype(np.float32)
    labels = random.integers(0, 5, len(probabilities))
    sums = class_sums(probabilities, labels, 15)
    for column in range(5):
        own = top_sums(probabilities[:, column].astype(float), (labels == column).astype(float), 15)
        assert sums.counts[column].tolist() == own.counts.tolist()
        assert sums.right[column].tolist() == own.right.tolist()
        np.testing.assert_allclose(sums.confidence[column], own.confidence)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_type_find_their_cell(kind: type) -> None:
    probabilities = np.full((2, 100), 0.01)
    labels = np.array([0, 99])
    right = class_sums(probabilities, labels.astype(kind), 15).right
    assert right.nonzero()[0].tolist() == [0, 99]


def test_the_input_stays_as_it_was_whatever_its_layout() -> None:
    probabilities = np.asfortranarray(softmax(np.random.default_rng(0).normal(size=(40, 3))))
    before, labels = probabilities.copy(), np.zeros(40, np.int64)
    found = class_sums(probabilities, labels, 4)
    np.testing.assert_array_equal(probabilities, before)
    np.testing.assert_array_equal(found.counts, class_sums(before.copy("C"), labels, 4).counts)
