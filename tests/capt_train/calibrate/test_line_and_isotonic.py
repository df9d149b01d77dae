"""Against scikit-learn, grids, and blocks counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from capt_deploy.confidence.calibration import top_log_odds
from capt_train.calibrate.isotonic import fit_isotonic
from capt_train.calibrate.line import fit_line

SLOPES, OFFSETS = np.linspace(0.05, 3, 296), np.linspace(-3, 3, 301)


def drawn(
    seed: int, images: int, slope: float = 1.0, offset: float = 0.0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return log-odds, and whether images are right with the probability σ(slope·ℓ + offset)."""
    random = np.random.default_rng(seed)
    odds = random.normal(1.5, 2, images)
    return odds, random.random(images) < 1 / (1 + np.exp(-(slope * odds + offset)))


def objective(odds: NDArray[Any], correct: NDArray[Any], a: Any, b: Any) -> Any:
    """What is minimised, image by image: −log of the chance of what happened, and both priors."""
    total = (a - 1) ** 2 / (2 * 0.5**2) + b**2 / (2 * 0.5**2)
    for own, right in zip(odds, correct, strict=True):
        total = total + np.log1p(np.exp(-(a * own + b) if right else a * own + b))
    return total


def line(odds: NDArray[Any], correct: NDArray[Any]) -> tuple[float, float]:
    found = fit_line(odds, correct)
    assert found.below == found.above
    assert found.positions == (0.0,)
    return found.below, found.values[0]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 60),
    slope=st.floats(0.2, 2),
    offset=st.floats(-2, 2),
)
def test_no_line_on_a_fine_grid_explains_better_what_was_right(
    seed: int, images: int, slope: float, offset: float
) -> None:
    odds, correct = drawn(seed, images, slope, offset)
    a, b = line(odds, correct)
    costs = objective(odds, correct, SLOPES[:, None], OFFSETS[None])
    assert objective(odds, correct, a, b) <= costs.min() + 1e-9
    at = np.unravel_index(costs.argmin(), costs.shape)
    assert (a, b) == pytest.approx((SLOPES[at[0]], OFFSETS[at[1]]), abs=0.05)


def test_many_images_give_the_line_of_logistic_regression_without_a_prior() -> None:
    odds, correct = drawn(0, 20_000, 0.6, 0.4)
    oracle = LogisticRegression(C=1e9, tol=1e-10).fit(odds[:, None], correct)
    a, b = line(odds, correct)
    assert (a, b) == pytest.approx((oracle.coef_[0, 0], oracle.intercept_[0]), abs=2e-3)
    assert (a, b) == pytest.approx((0.6, 0.4), abs=0.06)


@pytest.mark.parametrize("images", [1, 2, 10, 50])
@pytest.mark.parametrize("right", [True, False])
def test_images_that_are_all_right_or_all_wrong_move_the_line_little(
    images: int, right: bool
) -> None:
    odds = np.linspace(0.5, 4, images)
    a, b = line(odds, np.full(images, right))
    assert 0.05 <= a < 2.5
    assert abs(b) < 2.5
    if images == 1:
        assert (a, b) == pytest.approx((1, 0), abs=0.25)
    confidence = 1 / (1 + math.exp(-(a * 2 + b)))
    assert (confidence > 0.88) == right


def test_no_images_leave_everything_as_it_is() -> None:
    assert line(np.empty(0), np.empty(0, bool)) == (1.0, 0.0)


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e6])
def test_log_odds_of_any_size_give_numbers(size: float) -> None:
    odds, correct = drawn(0, 200)
    with np.errstate(invalid="raise"):
        a, b = line(odds * size, correct)
    assert math.isfinite(a) and math.isfinite(b)


def test_confidence_that_says_the_opposite_becomes_flat() -> None:
    odds, correct = drawn(0, 500, -1.0)
    a, b = line(odds, correct)
    assert a == 0.05
    # of all lines as flat as this, it is the best one
    costs = [objective(odds, correct, a, offset) for offset in OFFSETS]
    assert b == pytest.approx(OFFSETS[int(np.argmin(costs))], abs=0.02)


def test_blocks_by_hand() -> None:
    odds = np.array([3.0, -2.0, 1.0, -1.0, 5.0, 2.0, 4.0])
    correct = np.array([0, 0, 1, 0, 1, 1, 1], bool)
    # sorted: -2 wrong, -1 wrong | 1 right, 2 right, 3 wrong | 4 right, 5 right
    found = fit_isotonic(odds, correct)
    assert found.positions == pytest.approx((-1.5, 2.0, 4.5))
    shares = (1 / 4, 3 / 5, 3 / 4)
    assert found.values == pytest.approx([math.log(s / (1 - s)) for s in shares])
    assert (found.below, found.above) == (1.0, 1.0)


def test_blocks_that_nearly_touch_are_one() -> None:
    odds = np.array([0.0, 0.1, 0.2, 3.0, 3.0])
    correct = np.array([0, 0, 1, 1, 1], bool)  # blocks: two wrong at 0.05, three right at 2.07
    assert fit_isotonic(odds, correct).positions == pytest.approx((0.05, 6.2 / 3))
    near = np.array([0.0, 0.1, 0.2])
    found = fit_isotonic(near, correct[:3])
    assert found.positions == pytest.approx((0.1,))
    assert found.values == pytest.approx((math.log(2 / 3),))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 300), coarse=st.booleans())
def test_it_is_the_isotonic_regression_but_for_rare_levels(
    seed: int, images: int, coarse: bool
) -> None:
    odds, correct = drawn(seed, images, 0.7, 0.3)
    if coarse:
        odds = odds.round()  # ties
    found = fit_isotonic(odds, correct)
    assert (np.diff(found.positions) >= 0.25 - 1e-9).all()
    assert (np.diff(found.values) >= 0).all()
    mapped = 1 / (1 + np.exp(-found(np.sort(odds))))
    assert (np.diff(mapped) >= -1e-12).all()
    assert 0 < mapped.min() <= mapped.max() < 1
    assert found.positions[0] >= odds.min() - 1e-9
    assert found.positions[-1] <= odds.max() + 1e-9


def test_many_images_give_the_shares_of_scikit_learn() -> None:
    odds, correct = drawn(0, 30_000, 0.5, 0.5)
    oracle = IsotonicRegression(y_min=0, y_max=1).fit(odds, correct)
    asked = np.linspace(-1, 5, 61)
    found = 1 / (1 + np.exp(-fit_isotonic(odds, correct)(asked)))
    truth = 1 / (1 + np.exp(-(0.5 * asked + 0.5)))
    assert np.abs(found - oracle.predict(asked)).max() < 0.05
    assert np.abs(found - truth).max() < 0.04


@pytest.mark.parametrize("right", [True, False])
def test_one_block_is_one_knot(right: bool) -> None:
    odds, _ = drawn(0, 40)
    found = fit_isotonic(odds, np.full(40, right))
    share = 41 / 42 if right else 1 / 42
    assert found.positions == pytest.approx((odds.mean(),))
    assert found.values == pytest.approx((math.log(share / (1 - share)),))
    one = fit_isotonic(np.array([1.0]), np.array([right]))
    assert one.values == pytest.approx((math.log(2) if right else -math.log(2),))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 6),
    size=st.sampled_from([0.1, 5.0, 500.0]),
)
def test_log_odds_are_those_of_the_softmax(seed: int, classes: int, size: float) -> None:
    logits = np.random.default_rng(seed).normal(0, size, (10, classes))
    for row, found in zip(logits, top_log_odds(logits), strict=True):
        best = row.argmax()
        others = np.delete(row, best)
        rest = others.max() + math.log(sum(math.exp(z - others.max()) for z in others))
        assert found == pytest.approx(row[best] - rest, abs=1e-9)
        if size == 0.1:
            share = math.exp(row[best]) / sum(math.exp(z) for z in row)
            assert found == pytest.approx(math.log(share / (1 - share)), abs=1e-9)
