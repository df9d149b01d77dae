"""The factors of DAC against the formula written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from capt_deploy.confidence.distance_aware import TunedTexts

Rows = NDArray[np.float32]


def random_rows(seed: int, *shape: int) -> Rows:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def closeness(text: Rows, tuned: Rows) -> float:
    """Return exp(−d) of the mean distance to the five nearest."""
    unit = [(row / np.linalg.norm(row)).tolist() for row in (text, *tuned)]
    apart = sorted(math.dist(unit[0], other) for other in unit[1:])[:5]
    return math.exp(-sum(apart) / len(apart))


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_factors_agree_with_the_formula_written_out(count: int) -> None:
    rows, hand_written = random_rows(1, 2, 12, 6)
    texts = TunedTexts(rows[:count], hand_written[:count])
    found = texts.factors(rows[count:], hand_written[count:])
    for place, factor in enumerate(found, start=count):
        before = closeness(hand_written[place], hand_written[:count])
        after = closeness(rows[place], rows[:count])
        assert float(factor) == pytest.approx(after / before, rel=1e-5)


def test_what_tuning_has_not_moved_keeps_its_confidence() -> None:
    rows = random_rows(2, 6, 4)
    # longer rows are the mixture's business, not a distance
    found = TunedTexts(3 * rows[:3], rows[:3]).factors(3 * rows[3:], rows[3:])
    assert found.tolist() == pytest.approx([1.0] * 3)


def test_a_class_that_tuning_has_moved_away_loses_and_one_that_came_nearer_gains() -> None:
    tuned = np.eye(2, 3, dtype=np.float32)
    texts = TunedTexts(tuned, tuned)
    before = np.array([[1, 0, 1], [1, 0, 1]], np.float32)
    after = np.array([[0, 0, 5], [2, 0, 1]], np.float32)
    away, nearer = texts.factors(after, before)
    assert away < 1 < nearer
    # √2 from both, as against √(2−√2) from one and √2 from the other
    root = 2**0.5
    assert away == pytest.approx(np.exp(-(root - (root + (2 - root) ** 0.5) / 2)), rel=1e-6)


def test_no_class_tuned_on_is_no_distance() -> None:
    nothing = np.empty((0, 3), np.float32)
    rows = np.ones((2, 3), np.float32)
    assert TunedTexts(nothing, nothing).factors(rows, -rows).tolist() == [1.0, 1.0]
