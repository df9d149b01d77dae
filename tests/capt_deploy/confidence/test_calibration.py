"""Each step of a calibration against its formula written out, and its JSON forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import LEAD, Calibration, TopLabelMap, VectorScaling
from capt_deploy.metrics.calibration import softmax

LINE = TopLabelMap((0.0,), (0.5,), 0.7, 0.7)
STEPS = TopLabelMap((-1.0, 0.3, 0.9, 4.0), (-0.8, -0.8, 1.1, 2.5), 0.4, 1.5)
IDENTITY = TopLabelMap((0.0,), (0.0,), 1.0, 1.0)
MAPPED_BY_LINE, MAPPED_BY_STEPS = Calibration(top_label=LINE), Calibration(top_label=STEPS)
VECTOR = Calibration(1.0, VectorScaling((2.0, 0.5, 1.0), (0.25, -1.0, 0.0)))
FACTORS = (1.0, 0.9, 1.1, 0.7)
DAC = Calibration(factors=FACTORS)


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
    shifted = own.shift(logits)
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
        assert own.shift(logits).argmax(axis=1).tolist() == [1, 0]


def test_where_confidence_would_fall_below_the_second_class_it_stays_before_it() -> None:
    pessimist = TopLabelMap((0.0,), (-9.0,), 0.0, 0.0)
    found = pessimist.shift(np.array([[5.0, 1.0, -2.0]]))
    assert found[0].tolist() == pytest.approx([1.0 + LEAD, 1.0, -2.0])


@pytest.mark.parametrize("logits", [[[800.0, -800.0]], [[1e4, 0.0, -1e4]], [[0.0, -1e30]]])
def test_extreme_logits_give_numbers(logits: list[list[float]]) -> None:
    for dtype in (np.float32, np.float64):
        with np.errstate(over="raise", invalid="raise"):
            found = MAPPED_BY_STEPS.probabilities(np.array(logits, dtype))
        assert np.isfinite(found).all()
        assert found.argmax() == 0
        assert found.sum() == pytest.approx(1)


def test_two_classes_one_image_and_one_class() -> None:
    found = MAPPED_BY_LINE.probabilities(np.array([[0.0, 1.2]]))
    assert found[0, 1] == pytest.approx(1 / (1 + math.exp(-(0.7 * 1.2 + 0.5))))
    assert MAPPED_BY_LINE.probabilities(np.array([[3.0], [-2.0]])).tolist() == [[1.0], [1.0]]
    assert MAPPED_BY_LINE.probabilities(np.empty((0, 3))).shape == (0, 3)


def test_the_identity_and_no_map_change_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 5))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(Calibration().probabilities(logits), expected, atol=1e-12)
    np.testing.assert_allclose(
        Calibration(top_label=IDENTITY).probabilities(logits), expected, atol=1e-3
    )


def test_what_is_not_a_number_stays_that() -> None:
    found = MAPPED_BY_STEPS.probabilities(np.array([[np.nan, 1.0], [2.0, 1.0]]))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


WHOLE = Calibration(1.7, VECTOR.vector, STEPS, (1.0, 0.9, 1.1), "isotonic", 0.1)


@settings(max_examples=50, deadline=None)
@given(own=maps())
def test_a_map_comes_back_from_json_to_the_bit(own: TopLabelMap) -> None:
    fitted = Calibration(1.3, top_label=own, calibrator="line")
    assert Calibration.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_a_run_keeps_everything_but_the_factors() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(WHOLE.to_dict()))) == replace(
        WHOLE, factors=None
    )


def test_a_manifest_has_a_temperature_for_each_graph() -> None:
    written = WHOLE.to_manifest({"fp32": 1.7, "int8": 1.9}, 0.8)
    assert written["calibration"]["int8"] == {
        **{"temperature": 1.9, "zero_shot_temperature": 0.8},
        "distance_aware": True,
    }
    entry, maps = written["calibration"]["int8"], (written["top_label"], written["vector_scaling"])
    found = Calibration.from_manifest(entry, *maps)
    assert found == Calibration(1.9, WHOLE.vector, STEPS, calibrator="")
    plain = Calibration(2.0).to_manifest({"fp32": 2.0}, None)
    assert plain == {
        "calibration": {"fp32": {"temperature": 2.0}},
        **{"top_label": None, "vector_scaling": None},
    }


WRITTEN = {"positions": [0.0, 1.0], "values": [0.0, 2.0], "below": 1.0, "above": 0.0}


def read_map(values: Any) -> TopLabelMap | None:
    return Calibration.from_dict({**Calibration().to_dict(), "top_label": values}).top_label


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
    assert read_map(WRITTEN)
    with pytest.raises(ValueError, match=message):
        read_map({**WRITTEN, **change})


@pytest.mark.parametrize("wrong", [{}, {**WRITTEN, "values": None}, {**WRITTEN, "below": "x"}, 3])
def test_what_has_another_form_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, KeyError, ValueError)):
        read_map(wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_class_has_its_own_scale_and_bias(dtype: type) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(dtype)
    vector, colder = VECTOR.vector, replace(VECTOR, temperature=2.0)
    assert vector is not None
    found = colder.scale(logits)
    assert found.dtype == np.float64
    for row in range(6):
        for column, (scale, bias) in enumerate(zip(vector.scales, vector.biases, strict=True)):
            expected = (scale * float(logits[row, column]) + bias) / 2
            assert found[row, column] == pytest.approx(expected)
    np.testing.assert_allclose(colder.unscale(found), logits, atol=1e-12)
    with pytest.raises(ValueError, match="broadcast"):
        VECTOR.scale(np.zeros((4, 2)))


def test_selected_classes_keep_their_values_and_new_ones_are_neutral() -> None:
    both = replace(VECTOR, factors=(0.5, 0.6, 0.7))
    assert both.select((2, 0)) == Calibration(
        1.0, VectorScaling((1.0, 2.0), (0.0, 0.25)), factors=(0.7, 0.5)
    )
    assert both.select(np.array([1, 3, 7])) == Calibration(
        1.0, VectorScaling((0.5, 1.0, 1.0), (-1.0, 0.0, 0.0)), factors=(0.6, 1.0, 1.0)
    )
    logits = np.array([[1.0, 2.0, 3.0]])
    places = [2, 0, 1]
    np.testing.assert_array_equal(
        both.select(places).apply(logits[:, places])[1], both.apply(logits)[1][:, places]
    )


@pytest.mark.parametrize(
    ("scales", "biases"),
    [
        ((1.0,), (0.0, 0.0)),
        ((0.0,), (0.0,)),
        ((-1.0,), (0.0,)),
        ((math.nan,), (0.0,)),
        ((math.inf,), (0.0,)),
        ((1.0,), (math.nan,)),
    ],
)
def test_scaling_without_an_inverse_is_refused(
    scales: tuple[float, ...], biases: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="vector scaling"):
        VectorScaling(scales, biases)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_temperature_and_factors_are_positive(value: float) -> None:
    with pytest.raises(ValueError, match="temperature above 0"):
        Calibration(value)
    with pytest.raises(ValueError, match="factors of distance-aware calibration above 0"):
        Calibration(factors=(1.0, value))


def random_logits(seed: int = 0, images: int = 50) -> NDArray[np.float32]:
    return (5 * np.random.default_rng(seed).normal(size=(images, 4))).astype(np.float32)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_each_image_gets_the_factor_of_its_most_probable_class(seed: int) -> None:
    plain = random_logits(seed, 3)
    found = DAC.weigh(plain)
    for before, after in zip(plain, found, strict=True):
        best = max(range(4), key=lambda column: before[column])
        np.testing.assert_allclose(after, [FACTORS[best] * z for z in before], rtol=1e-6)
        assert after.argmax() == best
    np.testing.assert_allclose(DAC.unweigh(found), plain, rtol=1e-6)
    assert found.dtype == np.float32
    for same in (Calibration().weigh, Calibration().unweigh):
        np.testing.assert_array_equal(same(plain), plain)


def test_a_tipped_image_is_compared_with_the_factor_of_its_reference() -> None:
    plain = np.array([[5.0, 4.999, 0, 0], [0, 0, 1, 2]], np.float32)
    tipped = np.array([[4.998, 5.0, 0, 0], [0, 0, 1, 2]], np.float32)
    reference, found = DAC.weigh(plain), DAC.weigh(tipped)
    assert np.abs(found - reference).max() > 0.4
    assert np.abs(DAC.align(found, reference) - reference).max() < 0.01
    # but not an image that has the wrong factor without being tipped
    wrong = DAC.select([1, 0, 2, 3]).weigh(plain)
    np.testing.assert_allclose(DAC.align(wrong, reference), wrong)


def test_probabilities_of_many_classes_are_computed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (7, 5)).astype(np.float32)
    whole = MAPPED_BY_STEPS.probabilities(logits)
    for numbers in (1, 11, 20):
        monkeypatch.setattr("capt_deploy.confidence.calibration._BLOCK", numbers)
        assert np.array_equal(MAPPED_BY_STEPS.probabilities(logits), whole)
