"""The factors: applied image by image, undone, and compared where the class has changed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.confidence.distance_aware import TunedTexts, aligned, applied, undone

FACTORS = np.array([1.0, 0.9, 1.1, 0.7], np.float32)


def logits(seed: int = 0, images: int = 50) -> np.ndarray:
    return (5 * np.random.default_rng(seed).normal(size=(images, 4))).astype(np.float32)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_each_image_gets_the_factor_of_its_most_probable_class(seed: int) -> None:
    plain = logits(seed, 3)
    found = applied(plain, FACTORS)
    for before, after in zip(plain, found, strict=True):
        best = max(range(4), key=lambda column: before[column])
        np.testing.assert_allclose(after, [FACTORS[best] * z for z in before], rtol=1e-6)
        assert after.argmax() == best
    np.testing.assert_allclose(undone(found, FACTORS), plain, rtol=1e-6)
    assert found.dtype == np.float32


def test_a_tipped_image_is_compared_with_the_factor_of_its_reference() -> None:
    plain = np.array([[5.0, 4.999, 0, 0], [0, 0, 1, 2]], np.float32)
    tipped = np.array([[4.998, 5.0, 0, 0], [0, 0, 1, 2]], np.float32)
    wanted, found = applied(plain, FACTORS), applied(tipped, FACTORS)
    assert np.abs(found - wanted).max() > 0.4
    assert np.abs(aligned(found, wanted, FACTORS) - wanted).max() < 0.01
    # but not what has the wrong factor without being tipped
    wrong = applied(plain, FACTORS[[1, 0, 2, 3]])
    np.testing.assert_allclose(aligned(wrong, wanted, FACTORS), wrong)


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
