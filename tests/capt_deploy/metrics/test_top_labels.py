"""Ties: every figure is the mean over all orders in which tied images could stand."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.metrics.top_labels import TopLabels, top_labels

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


def test_images_can_be_drawn_more_than_once() -> None:
    drawn = of([(0.5, True), (0.75, False)])[np.array([1, 1, 0])]
    assert drawn.confidence.tolist() == [0.75, 0.75, 0.5]
    assert drawn.correct.tolist() == [0, 0, 1]


def test_the_first_of_tied_classes_is_the_top_label() -> None:
    top = top_labels(np.full((2, 2), 0.5, np.float32), np.array([0, 1]))
    assert top.correct.tolist() == [1, 0]
    assert top.confidence.tolist() == [0.5, 0.5]
    assert top.confidence.dtype == np.float64
