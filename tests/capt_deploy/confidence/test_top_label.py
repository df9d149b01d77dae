"""The map written out knot by knot; what it does to logits, by the probabilities it leads to."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capt_deploy.confidence.top_label import LEAD, TopLabelMap, probabilities_of
from capt_deploy.metrics.calibration import softmax

LINE = TopLabelMap((0.0,), (0.5,), 0.7, 0.7)
STEPS = TopLabelMap((-1.0, 0.3, 0.9, 4.0), (-0.8, -0.8, 1.1, 2.5), 0.4, 1.5)
IDENTITY = TopLabelMap((0.0,), (0.0,), 1.0, 1.0)


def by_hand(own: TopLabelMap, odds: float) -> float:
    """Return ℓ' from the two knots beside ℓ, or the slope outside of them."""
    x, y = own.positions, own.values
    if odds <= x[0]:
        return y[0] + own.below * (odds - x[0])
    if odds >= x[-1]:
        return y[-1] + own.above * (odds - x[-1])
    right = next(k for k in range(len(x)) if x[k] >= odds)
    share = (odds - x[right - 1]) / (x[right] - x[right - 1])
    return (1 - share) * y[right - 1] + share * y[right]


def log_odds(row: NDArray[Any]) -> float:
    """Return log(p/(1−p)) of the largest of some logits, summed without any shortcut."""
    best = int(row.argmax())
    others = [float(z) for column, z in enumerate(row) if column != best]
    largest = max(others)
    return float(row[best]) - largest - math.log(sum(math.exp(z - largest) for z in others))


@st.composite
def maps(draw: Any) -> TopLabelMap:
    knots = draw(st.integers(1, 6))
    gaps = draw(st.lists(st.floats(0.01, 3), min_size=knots, max_size=knots))
    rises = draw(st.lists(st.floats(0, 3), min_size=knots, max_size=knots))
    slopes = draw(st.tuples(st.floats(0, 3), st.floats(0, 3)))
    positions, values = np.cumsum(gaps) - 3, np.cumsum(rises) - 2
    return TopLabelMap(tuple(positions.tolist()), tuple(values.tolist()), *slopes)


@settings(max_examples=100, deadline=None)
@given(own=maps(), odds=st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_it_is_linear_between_knots_and_outside_of_them(
    own: TopLabelMap, odds: list[float]
) -> None:
    expected = [by_hand(own, one) for one in odds]
    assert own(np.array(odds)).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    ordered = own(np.sort(odds))
    assert (np.diff(ordered) >= -1e-9).all()


def test_knots_that_nearly_touch_cost_no_digits() -> None:
    own = TopLabelMap((1.0, 1.0 + 1e-12, 2.0, 2.0 + 1e-12), (0.0, 1.0, 1.0, 3.0), 1.0, 1.0)
    assert own(np.array([0.5, 1.5, 3.0])).tolist() == pytest.approx([-0.5, 1.0, 4.0], abs=1e-9)


def test_it_takes_arrays_of_any_shape() -> None:
    odds = np.linspace(-3, 6, 12)
    np.testing.assert_array_equal(STEPS(odds.reshape(3, 2, 2)).ravel(), STEPS(odds))
    assert STEPS(np.float64(0.5)).shape == ()
    assert STEPS(np.empty(0)).shape == (0,)
    assert np.isnan(STEPS(np.array([np.nan]))).all()


@settings(max_examples=60, deadline=None)
@given(
    own=maps(),
    seed=st.integers(0, 1000),
    classes=st.integers(2, 7),
    size=st.sampled_from([0.1, 3.0, 30.0, 1000.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_top_probability_is_the_mapped_one_and_the_others_keep_their_proportions(
    own: TopLabelMap, seed: int, classes: int, size: float, dtype: type
) -> None:
    logits = np.random.default_rng(seed).normal(0, size, (20, classes)).astype(dtype)
    shifted = own.shifted(logits)
    assert shifted.dtype == np.float64
    assert shifted.shape == logits.shape
    for row, after in zip(logits, shifted, strict=True):
        best = int(row.argmax())
        others = np.arange(classes) != best
        assert int(after.argmax()) == best
        np.testing.assert_array_equal(after[others], row[others].astype(np.float64))
        assert after[best] - after[others].max() >= LEAD * (1 - 1e-6)
        wanted = by_hand(own, log_odds(row))
        floor = log_odds(np.append(row[others].astype(float), float(row[others].max()) + LEAD))
        assert log_odds(after) == pytest.approx(max(wanted, floor), rel=1e-6, abs=1e-5)
        confidence = softmax(after[None])[0, best]
        assert confidence == pytest.approx(1 / (1 + math.exp(-log_odds(after))), abs=1e-9)


def test_tied_classes_stay_in_their_order() -> None:
    logits = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    for own in (LINE, STEPS, IDENTITY):
        assert own.shifted(logits).argmax(axis=1).tolist() == [1, 0]


def test_where_confidence_would_fall_below_the_second_class_it_stays_before_it() -> None:
    pessimist = TopLabelMap((0.0,), (-9.0,), 0.0, 0.0)
    found = pessimist.shifted(np.array([[5.0, 1.0, -2.0]]))
    assert found[0].tolist() == pytest.approx([1.0 + LEAD, 1.0, -2.0])


@pytest.mark.parametrize("logits", [[[800.0, -800.0]], [[1e4, 0.0, -1e4]], [[0.0, -1e30]]])
def test_extreme_logits_give_numbers(logits: list[list[float]]) -> None:
    for dtype in (np.float32, np.float64):
        with np.errstate(over="raise", invalid="raise"):
            found = probabilities_of(np.array(logits, dtype), STEPS)
        assert np.isfinite(found).all()
        assert found.argmax() == 0
        assert found.sum() == pytest.approx(1)


def test_two_classes_one_image_and_one_class() -> None:
    found = probabilities_of(np.array([[0.0, 1.2]]), LINE)
    assert found[0, 1] == pytest.approx(1 / (1 + math.exp(-(0.7 * 1.2 + 0.5))))
    assert probabilities_of(np.array([[3.0], [-2.0]]), LINE).tolist() == [[1.0], [1.0]]
    assert probabilities_of(np.empty((0, 3)), LINE).shape == (0, 3)


def test_the_identity_and_no_map_change_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 5))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities_of(logits, None), expected, atol=1e-12)
    np.testing.assert_allclose(probabilities_of(logits, IDENTITY), expected, atol=1e-3)


def test_what_is_not_a_number_stays_that() -> None:
    found = probabilities_of(np.array([[np.nan, 1.0], [2.0, 1.0]]), STEPS)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


@settings(max_examples=50, deadline=None)
@given(own=maps())
def test_it_comes_back_from_json_to_the_bit(own: TopLabelMap) -> None:
    assert TopLabelMap.from_dict(json.loads(json.dumps(own.to_dict()))) == own


WRITTEN = {"positions": [0.0, 1.0], "values": [0.0, 2.0], "below": 1.0, "above": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": []}, "at least one"),
        ({"positions": [], "values": []}, "at least one"),
        ({"positions": [0.0]}, "as many values"),
        ({"positions": [1.0, 0.0]}, "rising positions"),
        ({"positions": [1.0, 1.0]}, "rising positions"),
        ({"values": [2.0, 0.0]}, "never fall"),
        ({"values": [0.0, math.nan]}, "finite"),
        ({"values": [0.0, math.inf]}, "finite"),
        ({"below": -0.1}, "0 or more"),
        ({"above": -0.1}, "0 or more"),
        ({"above": math.inf}, "finite"),
        ({"slope": 1.0}, "unknown keys"),
    ],
)
def test_what_is_no_monotone_map_is_refused(change: dict[str, Any], message: str) -> None:
    assert TopLabelMap.from_dict(WRITTEN)
    with pytest.raises(ValueError, match=message):
        TopLabelMap.from_dict({**WRITTEN, **change})


@pytest.mark.parametrize("wrong", [{}, {**WRITTEN, "values": None}, {**WRITTEN, "below": "x"}, 3])
def test_what_has_another_form_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, KeyError, ValueError)):
        TopLabelMap.from_dict(wrong)
