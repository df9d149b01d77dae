"""Scores against their definitions written out again, quantiles by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.confidence.conformal_scores import (
    METHODS,
    RapsPenalty,
    class_quantiles,
    class_scores,
    label_scores,
    quantile,
)


def slow_score(row: list[float], label: int, method: str, penalty: RapsPenalty, u: float) -> float:
    if method == "lac":
        return 1 - row[label]
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    rank = order.index(label) + 1
    total = 0.0
    for index in order[:rank]:
        total += row[index]
    total -= u * row[label]
    return total + (penalty.weight * max(0, rank - penalty.free_ranks) if method == "raps" else 0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from(METHODS),
    st.booleans(),
    st.booleans(),
)
def test_scores_equal_their_definitions(
    seed: int, images: int, classes: int, method: str, randomised: bool, ties: bool
) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(classes), images).astype(np.float32)
    if ties:
        probabilities = np.round(probabilities * 4) / 4
    penalty = RapsPenalty(random.random(), int(random.integers(0, classes + 2)))
    uniforms = random.random(images) if randomised and method != "lac" else None
    scores = class_scores(probabilities, method, penalty, uniforms)
    for image, row in enumerate(probabilities):
        u = 0 if uniforms is None else uniforms[image]
        slow = [slow_score([*map(float, row)], c, method, penalty, u) for c in range(classes)]
        np.testing.assert_array_equal(scores[image], slow)
    labels = random.integers(0, classes, images)
    np.testing.assert_array_equal(
        label_scores(probabilities, labels, method, penalty, uniforms),
        scores[np.arange(images), labels],
    )


@pytest.mark.parametrize("method", METHODS)
def test_many_images_are_scored_in_blocks_without_a_difference(method: str) -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(700), 3100).astype(np.float32)  # three blocks
    labels = random.integers(0, 700, 3100)
    uniforms = None if method == "lac" else random.random(3100)
    np.testing.assert_array_equal(
        label_scores(probabilities, labels, method, uniforms=uniforms),
        class_scores(probabilities, method, uniforms=uniforms)[np.arange(3100), labels],
    )


def test_quantiles_are_order_statistics() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 20))  # 1 to 19
    assert quantile(scores, 0.9) == 18
    assert quantile(scores, 0.95) == 19
    assert quantile(scores, 0.951) == math.inf
    assert quantile(scores, 0.901) == 19
    assert quantile(scores, 1e-12) == 1
    assert quantile(np.empty(0), 0.5) == math.inf
    assert quantile(np.array([-np.inf, 2.0, 1.0]), 0.25) == -math.inf


def test_ranks_are_those_of_the_decimal_numbers() -> None:
    for n in (99, 999, 9999):
        scores = np.arange(1.0, n + 1)
        for percent in range(1, 100):
            assert quantile(scores, percent / 100) == percent * (n + 1) // 100
    assert 100 * 0.07 > 7, "the case must be one that floats get wrong"


def test_every_class_has_its_own_quantile() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 5, 200)
    labels[labels == 3] = 2  # none of class 3
    scores = random.random(200)
    got = class_quantiles(scores, labels, 7, 0.8)
    expected = [quantile(scores[labels == index], 0.8) for index in range(7)]
    np.testing.assert_array_equal(got, expected)
    assert np.isinf(got[[3, 5, 6]]).all()


def test_bad_input_is_refused() -> None:
    good, labels = np.full((2, 4), 0.25), np.array([0, 3])
    with pytest.raises(ValueError, match="'best'"):
        class_scores(good, "best")
    with pytest.raises(ValueError, match="never randomised"):
        class_scores(good, "lac", uniforms=np.zeros(2))
    with pytest.raises(ValueError, match="2 uniforms"):
        class_scores(good, "aps", uniforms=np.zeros(1))
    with pytest.raises(ValueError, match="labels of 4 classes"):
        label_scores(good, np.array([0, 4]), "lac")
    with pytest.raises(ValueError, match="labels of 4 classes"):
        label_scores(good, np.array([-1, 0]), "lac")
    with pytest.raises(ValueError, match="at least one"):
        label_scores(good[:0], labels[:0], "aps")
    with pytest.raises(ValueError, match="at least one"):
        label_scores(good, labels[:1], "aps")
    for wrong in (math.nan, -0.1, 1.5):
        with pytest.raises(ValueError, match="0-1"):
            label_scores(np.full((2, 4), wrong), labels, "aps")
    with pytest.raises(ValueError, match="NaN"):
        quantile(np.array([1.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="labels"):
        class_quantiles(np.ones(2), np.array([0, 2]), 2, 0.5)
    for penalty in ((-1, 3), (math.nan, 3), (math.inf, 3), (0.1, -1)):
        with pytest.raises(ValueError, match="weight"):
            RapsPenalty(*penalty)
