"""The promise by simulation, and Clopper & Pearson's bound against SciPy and by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from capt_deploy.confidence.rejection import RejectionTable, _tail

DRAWS = 500
# Binomial: more misses than this happen to a promise that is kept once in 1000 tests.
MOST_MISSES = 0.05 * DRAWS + 3.1 * math.sqrt(DRAWS * 0.05 * 0.95)

World = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def calibrated(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = random.beta(2, 0.5, n)
    return confidence, confidence


def overconfident(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = random.beta(3, 0.33, n)
    return confidence, confidence**2.5


def in_steps(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As isotonic regression leaves them: few values, and many images at each."""
    confidence = random.choice([0.3, 0.6, 0.85, 0.95, 0.99], n, p=[0.1, 0.2, 0.2, 0.2, 0.3])
    return confidence, confidence


def just_too_bad(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every threshold misses 0.9, and by next to nothing: any that is found is a miss."""
    return random.random(n), np.full(n, 0.8999)


@pytest.mark.parametrize("world", [calibrated, overconfident, in_steps, just_too_bad])
@pytest.mark.parametrize(("n", "accuracy"), [(100, 0.9), (1000, 0.9), (1000, 0.95)])
def test_the_wanted_accuracy_is_missed_as_rarely_as_promised(
    world: World, n: int, accuracy: float
) -> None:
    random = np.random.default_rng(7)
    confidence, right = world(random, 200_000)
    order = np.argsort(-confidence)
    confidence, right = confidence[order], right[order]
    true_accuracy = np.cumsum(right) / np.arange(1, len(right) + 1)
    misses = found = 0
    for _ in range(DRAWS):
        own, chance = world(random, n)
        threshold = RejectionTable(own, random.random(n) < chance).threshold(accuracy)
        if threshold is not None:
            found += 1
            accepted = np.searchsorted(-confidence, -threshold, side="right")
            misses += true_accuracy[accepted - 1] < accuracy - 1e-4 * (world is in_steps)
    assert misses <= MOST_MISSES
    if world is not just_too_bad and n == 1000:
        assert found > 0.9 * DRAWS, "a promise that is never made is kept as well"


def test_the_level_is_used_up_where_it_counts() -> None:
    # One hypothesis that is false by nothing: as many misses as the binomial's steps allow.
    random = np.random.default_rng(0)
    found = sum(
        RejectionTable(np.full(200, 0.5), random.random(200) < 0.8999).threshold(0.9) is not None
        for _ in range(4000)
    )
    assert 0.02 < found / 4000 < 0.055


def test_most_of_what_could_be_accepted_is() -> None:
    random = np.random.default_rng(1)
    confidence, chance = calibrated(random, 5000)
    ordered = np.sort(confidence)[::-1]
    possible = (np.cumsum(ordered) / np.arange(1, 5001) >= 0.95).mean()
    table = RejectionTable(confidence, random.random(5000) < chance)
    threshold = table.threshold(0.95)
    assert threshold is not None
    assert 0.85 * possible < 1 - table.expected_rejection(threshold) <= possible


def test_thresholds_of_cases_done_by_hand() -> None:
    confidence = np.linspace(0.01, 1, 100)
    # The 28 most confident right, the others wrong. All 28 right just do not bound 0.9; 29 would.
    assert 0.9**29 < 0.05 < 0.9**28
    for right in range(100):
        threshold = RejectionTable(confidence, np.arange(100) >= 100 - right).threshold(0.9)
        assert (threshold is None) == (right < 29)
    # Steps are every second image, each one short: 29, 31, ... With 29 right, one of 31 is wrong.
    table = RejectionTable(confidence, np.arange(100) >= 71)
    assert table.threshold(0.9) == confidence[71]
    assert table.expected_rejection(confidence[71]) == pytest.approx(0.71)
    assert RejectionTable(confidence, np.ones(100, bool)).threshold(0.9) == 0
    assert RejectionTable(confidence, np.zeros(100, bool)).threshold(0.9) is None


def test_ties_are_accepted_together_or_not_at_all() -> None:
    confidence = np.repeat([0.9, 0.5], 100)
    correct = np.repeat([True, False], 100)
    table = RejectionTable(confidence, correct)
    assert table.threshold(0.9) == 0.9
    assert table.expected_rejection(0.9) == 0.5
    # Half of the lower ones right, whichever come first: the threshold may not part them.
    correct[100:150] = True
    assert RejectionTable(confidence, correct).threshold(0.9) == 0.9
    assert RejectionTable(confidence[::-1], correct[::-1]).threshold(0.9) == 0.9


def test_a_threshold_of_float32_confidences_accepts_just_the_same_ones_in_float32() -> None:
    random = np.random.default_rng(2)
    confidence = random.random(1000).astype(np.float32)
    table = RejectionTable(confidence, random.random(1000) < confidence**0.2)
    threshold = table.threshold(0.9)
    assert threshold
    accepted = [float(value) >= threshold for value in confidence]
    np.testing.assert_array_equal(confidence >= threshold, accepted)
    np.testing.assert_array_equal(confidence >= np.float32(threshold), accepted)
    assert 1 - np.mean(accepted) == pytest.approx(table.expected_rejection(threshold))


def test_more_accuracy_and_more_certainty_reject_more() -> None:
    random = np.random.default_rng(3)
    confidence, chance = calibrated(random, 3000)
    table = RejectionTable(confidence, random.random(3000) < chance)
    for thresholds in (
        [table.threshold(accuracy) for accuracy in (0.82, 0.87, 0.92, 0.96)],
        [table.threshold(0.93, level) for level in (0.5, 0.8, 0.95, 0.999)],
    ):
        assert None not in thresholds
        assert thresholds == sorted(thresholds)
        assert thresholds[0] < thresholds[-1]


@pytest.mark.parametrize("images", [1, 2, 59, 1000, 20_000])
@pytest.mark.parametrize("accuracy", [0.5, 0.95, 0.999])
def test_tails_equal_scipys(images: int, accuracy: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")
    for right in sorted({0, 1, images // 2, int(0.95 * images), images - 1, images}):
        expected = stats.binom.sf(right - 1, images, accuracy)
        assert _tail(right, images, accuracy) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_table_survives_its_arrays() -> None:
    random = np.random.default_rng(4)
    table = RejectionTable(random.random(300), random.random(300) < 0.95)
    again = RejectionTable.from_arrays(table.arrays())
    np.testing.assert_array_equal(again.confidence, table.confidence)
    np.testing.assert_array_equal(again.correct, table.correct)
    assert again.threshold(0.9) == table.threshold(0.9)


def test_bad_input_is_refused() -> None:
    good = RejectionTable(np.array([0.5]), np.array([True]))
    assert good.threshold(0.9) is None
    for shares in ((0, 0.95), (1, 0.95), (0.9, 1), (0.9, 0), (math.nan, 0.9)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            good.threshold(*shares)
    for confidence, correct in (([], []), ([0.5, 0.6], [True]), ([math.nan], [True])):
        with pytest.raises(ValueError, match="at least one"):
            RejectionTable(np.array(confidence), np.array(correct))
    with pytest.raises(ValueError, match="correct"):
        RejectionTable.from_arrays({"confidence": np.array([0.5])})
