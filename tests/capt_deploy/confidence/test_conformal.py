"""Scores and quantiles by their definitions; sets by theory, MAPIE, and cases done by hand."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.confidence.conformal import (
    METHODS,
    RapsPenalty,
    ScoreTable,
    choose_penalty,
    class_quantiles,
    class_scores,
    fewest_images,
    label_scores,
    quantile,
)


def slow_score(row: list[float], label: int, method: str, penalty: RapsPenalty) -> float:
    if method == "lac":
        return 1 - row[label]
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    rank = order.index(label) + 1
    total = 0.0
    for index in order[:rank]:
        total += row[index]
    return total + (penalty.weight * max(0, rank - penalty.free_ranks) if method == "raps" else 0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_scores_equal_their_definitions(
    seed: int, images: int, classes: int, method: str, ties: bool
) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(classes), images).astype(np.float32)
    if ties:
        probabilities = np.round(probabilities * 4) / 4
    penalty = RapsPenalty(random.random(), int(random.integers(0, classes + 2)))
    scores = class_scores(probabilities, method, penalty)
    for image, row in enumerate(probabilities):
        slow = [slow_score([*map(float, row)], c, method, penalty) for c in range(classes)]
        np.testing.assert_array_equal(scores[image], slow)
    labels = random.integers(0, classes, images)
    np.testing.assert_array_equal(
        label_scores(probabilities, labels, method, penalty),
        scores[np.arange(images), labels],
    )


@pytest.mark.parametrize("method", METHODS)
def test_many_images_are_scored_in_blocks_without_a_difference(method: str) -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(700), 3100).astype(np.float32)  # three blocks
    labels = random.integers(0, 700, 3100)
    np.testing.assert_array_equal(
        label_scores(probabilities, labels, method),
        class_scores(probabilities, method)[np.arange(3100), labels],
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


SPLITS = 200


def world(seed: int, n: int, classes: int = 20, sharpness: float = 1.0) -> tuple:
    """Images whose labels are drawn from their probabilities, which float32 holds exactly."""
    random = np.random.default_rng(seed)
    logits = sharpness * random.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    draws = random.random((n, 1)) * probabilities.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < draws).sum(axis=1)
    return probabilities.astype(np.float32), labels


def band(n: int, coverage: float, tested: int) -> tuple[float, float]:
    """Mean and deviation of the coverage of one split: beta-binomial, for scores without ties."""
    rank = math.ceil(round((n + 1) * coverage, 9))
    mean = rank / (n + 1)
    variance = mean * (1 - mean) / (n + 2)
    return mean, math.sqrt(variance + (mean * (1 - mean) - variance) / tested)


@pytest.mark.parametrize(("method", "allow_empty"), [*product(METHODS, (False, True))])
@pytest.mark.parametrize(("n", "coverage"), [(19, 0.9), (19, 0.8), (99, 0.95), (400, 0.9)])
def test_coverage_over_random_splits_is_what_theory_says(
    method: str, allow_empty: bool, n: int, coverage: float
) -> None:
    probabilities, labels = world(1, n + 500, sharpness=2.5)  # some sets are empty
    random, covered = np.random.default_rng(n), []
    for _ in range(SPLITS):
        order = random.permutation(len(labels))
        own = ScoreTable.from_probabilities(probabilities[order[:n]], labels[order[:n]])
        sets = own.sets(probabilities[order[n:]], coverage, method, allow_empty=allow_empty)
        covered.append(sets[np.arange(500), labels[order[n:]]].mean())
    mean, deviation = band(n, coverage, 500)
    # One rank more or less would move the mean by 1 / (n + 1), more than the band where n is small.
    assert abs(np.mean(covered) - mean) < 3.5 * deviation / math.sqrt(SPLITS)
    assert 0.8 < np.std(covered) / deviation < 1.2
    assert n > 99 or 3.5 * deviation / math.sqrt(SPLITS) < 1 / (n + 1)


@pytest.mark.parametrize("method", METHODS)
def test_coverage_of_every_class_is_what_theory_says(method: str) -> None:
    n, tested, classes = 19, 100, 4
    random = np.random.default_rng(5)
    mean, deviation = band(n, 0.9, tested)
    probabilities, labels = world(2, 6000, classes, sharpness=0.8)
    rows = np.stack([np.flatnonzero(labels == index)[: n + tested] for index in range(classes)])
    covered = np.zeros((SPLITS, classes))
    for split in range(SPLITS):
        shuffled = random.permuted(rows, axis=1)
        own, others = shuffled[:, :n].ravel(), shuffled[:, n:]
        table = ScoreTable.from_probabilities(probabilities[own], labels[own], RapsPenalty(0.1, 1))
        for index in range(classes):
            sets = table.sets(probabilities[others[index]], 0.9, method, True, allow_empty=True)
            covered[split, index] = sets[:, index].mean()
    assert np.abs(covered.mean(axis=0) - mean).max() < 3.5 * deviation / math.sqrt(SPLITS)
    assert 3.5 * deviation / math.sqrt(SPLITS) < 1 / (n + 1)


def test_the_most_probable_class_is_always_in_and_that_makes_no_set_larger() -> None:
    probabilities, labels = world(3, 4000, 5, sharpness=3.0)
    calibration, tested = slice(0, 1000), slice(1000, 4000)
    table = ScoreTable.from_probabilities(probabilities[calibration], labels[calibration])
    for method, coverage in (("lac", 0.8), ("aps", 0.9), ("raps", 0.9)):
        empty = table.sets(probabilities[tested], coverage, method, allow_empty=True)
        full = table.sets(probabilities[tested], coverage, method)
        assert (empty.sum(axis=1) == 0).any(), "the case must be one with empty sets"
        assert full[np.arange(3000), probabilities[tested].argmax(axis=1)].all()
        assert (full.sum(axis=1) <= np.maximum(empty.sum(axis=1), 1)).all()
        assert abs(full[np.arange(3000), labels[tested]].mean() - coverage) < 0.03


def test_sets_of_a_classifier_that_is_better_than_the_wanted_coverage_hold_one_class() -> None:
    probabilities, labels = world(4, 2000, 5, sharpness=8.0)
    right = (probabilities.argmax(axis=1) == labels).mean()
    assert right > 0.85
    table = ScoreTable.from_probabilities(probabilities, labels)
    for method in METHODS:
        sets = table.sets(probabilities, 0.8, method)
        assert (sets.sum(axis=1) == 1).all()
        papers = table.sets(probabilities, 0.8, method, allow_empty=True)
        assert papers[np.arange(2000), labels].mean() == pytest.approx(0.8, abs=0.001)


def test_sets_of_a_case_done_by_hand() -> None:
    rows = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
    table = ScoreTable.from_probabilities(rows, np.array([1, 1, 2]), RapsPenalty(0.5, 1))
    np.testing.assert_array_equal(table.correct, [False, True, True])
    np.testing.assert_array_equal(table.lac, [0.75, 0.5, 0.25])
    np.testing.assert_array_equal(table.aps, [0.75, 0.5, 0.75])
    np.testing.assert_array_equal(table.raps, [1.25, 0.5, 0.75])
    image = np.array([[0.625, 0.25, 0.125]])
    # coverage 0.75 of 3 images: the third smallest. Its own score is still inside.
    assert table.sets(image, 0.75, "lac").tolist() == [[True, True, False]]
    assert table.sets(image, 0.75, "aps").tolist() == [[True, False, False]]
    assert table.sets(image, 0.75, "raps").tolist() == [[True, False, False]]
    # coverage 0.5: the second smallest; the most probable class has 0.375, 0.625 and 0.625
    assert table.sets(image, 0.5, "lac", allow_empty=True).tolist() == [[True, False, False]]
    assert table.sets(image, 0.25, "lac", allow_empty=True).tolist() == [[False] * 3]
    assert table.sets(image, 0.25, "lac").tolist() == [[True, False, False]]
    # three images can promise no more than 0.75
    assert table.sets(image, 0.76, "lac").tolist() == [[True] * 3]


def test_a_class_with_too_few_images_is_in_every_set_and_so_is_one_added_later() -> None:
    probabilities, labels = world(6, 400, 4)
    few = np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:8]])
    table = ScoreTable.from_probabilities(probabilities[few], labels[few])
    with_added = np.hstack([probabilities * 0.9, np.full((400, 1), 0.1)])
    for method in METHODS:
        sets = table.sets(with_added, 0.9, method, class_conditional=True)
        assert sets[:, [2, 4]].all()
        assert not sets[:, [0, 1, 3]].all()
        assert not table.sets(with_added, 0.9, method)[:, 4].all()


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_a_coverage_needs_as_many_images_as_make_its_sets_say_something(coverage: float) -> None:
    images = fewest_images(coverage)
    scores = np.linspace(0, 1, images)
    assert np.isfinite(quantile(scores, coverage))
    assert images == 1 or np.isinf(quantile(scores[1:], coverage))


def test_fewer_classes_than_the_tables_are_refused_where_classes_matter() -> None:
    probabilities, labels = world(6, 400, 4)
    table = ScoreTable.from_probabilities(probabilities, labels)
    assert table.sets(probabilities[:, :3], 0.9).shape == (400, 3)
    with pytest.raises(ValueError, match="3 classes"):
        table.sets(probabilities[:, :3], 0.9, class_conditional=True)


@pytest.mark.parametrize("method", METHODS)
def test_one_image_has_the_same_set_as_among_others_in_either_precision(method: str) -> None:
    probabilities, labels = world(7, 600, 50)
    table = ScoreTable.from_probabilities(probabilities.astype(np.float64), labels)
    for coverage in (0.5, 0.8, 0.9):
        sets = table.sets(probabilities, coverage, method, allow_empty=True)
        for image in range(0, 600, 7):
            alone = table.sets(probabilities[image : image + 1], coverage, method, False, True)
            np.testing.assert_array_equal(alone[0], sets[image])
        # the image whose score is the quantile is inside, to the last bit
        covered = sets[np.arange(600), labels].sum()
        assert covered >= math.ceil(round(601 * coverage, 9))


def test_classes_that_float32_cannot_tell_apart_are_tied_in_both_precisions() -> None:
    wide = np.array([[0.4, 0.4 + 1e-12, 0.2]])
    assert wide.argmax() == 1
    table = ScoreTable.from_probabilities(wide, np.array([0]))
    assert table.correct.tolist() == [True]
    for probabilities in (wide, wide.astype(np.float32)):
        assert table.sets(probabilities, 0.5).tolist() == [[True, False, False]]


def test_ties_keep_the_promise() -> None:
    # float32 probabilities of 16 bits: many images have the very same scores
    probabilities, labels = world(8, 4000, 3)
    coarse = np.round(probabilities * 8) / 8
    for method in METHODS:
        table = ScoreTable.from_probabilities(coarse[:1000], labels[:1000])
        assert len(np.unique(getattr(table, method))) < 30
        covered = table.sets(coarse[1000:], 0.9, method)[np.arange(3000), labels[1000:]].mean()
        assert covered > 0.88


def test_a_table_survives_its_arrays_and_files() -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    probabilities, labels = world(9, 300)
    table = ScoreTable.from_probabilities(probabilities, labels, RapsPenalty(0.2, 3))
    again = ScoreTable.from_arrays(numpy_files.load(numpy_files.save(table.arrays())))
    assert again.penalty == table.penalty
    for method in METHODS:
        for conditional in (False, True):
            np.testing.assert_array_equal(
                again.sets(probabilities, 0.9, method, conditional),
                table.sets(probabilities, 0.9, method, conditional),
            )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lac", None, "'lac'"),
        ("aps", np.zeros(3), "4 float"),
        ("raps", np.full(4, np.nan), "NaN"),
        ("labels", np.array([0, -1, 0, 0]), "-1"),
        ("labels", np.zeros(4), "integer"),
        ("correct", np.zeros(4), "boolean"),
        ("raps_penalty", np.array([-1.0, 2.0]), "weight"),
        ("raps_penalty", np.array([0.1]), "2 float"),
    ],
)
def test_damaged_arrays_are_refused(name: str, value: np.ndarray | None, words: str) -> None:
    arrays = ScoreTable.from_probabilities(*world(9, 4)).arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(ValueError, match=words):
        ScoreTable.from_arrays(arrays)


def test_bad_requests_are_refused() -> None:
    probabilities, labels = world(9, 40)
    table = ScoreTable.from_probabilities(probabilities, labels)
    for coverage in (0, 1, -0.5, math.nan):
        with pytest.raises(ValueError, match="coverage"):
            table.sets(probabilities, coverage)
    with pytest.raises(ValueError, match="lac, aps, raps"):
        table.sets(probabilities, 0.9, "penalty")
    with pytest.raises(ValueError, match="images, classes"):
        table.sets(probabilities[0])
    assert table.sets(probabilities[:0]).shape == (0, 20)


def test_the_cache_of_limits_stays_small() -> None:
    probabilities, labels = world(9, 40)
    table = ScoreTable.from_probabilities(probabilities, labels)
    for coverage in np.linspace(0.1, 0.9, 500):
        table.sets(probabilities[:1], float(coverage))
    assert table._cached_limits.cache_info().currsize <= 64


def test_the_penalty_is_the_best_of_those_tried() -> None:
    probabilities, labels = world(10, 600, 30, sharpness=2.0)
    chosen = choose_penalty(probabilities, labels, 0.9)
    ranks = 1 + (probabilities > probabilities[np.arange(600), labels][:, None]).sum(axis=1)
    assert chosen.free_ranks == np.sort(ranks)[math.ceil(601 * 0.9) - 1]

    def size(weight: float) -> int:
        table = ScoreTable.from_probabilities(
            probabilities, labels, RapsPenalty(weight, chosen.free_ranks)
        )
        return int(table.sets(probabilities, 0.9, "raps").sum())

    sizes = {weight: size(weight) for weight in (0.001, 0.01, 0.1, 0.2, 0.5)}
    assert len(set(sizes.values())) > 1, "the case must tell the weights apart"
    assert sizes[chosen.weight] == min(sizes.values())


def test_a_penalty_of_too_few_images_frees_all_ranks() -> None:
    assert choose_penalty(*world(11, 5), 0.9).free_ranks == 20


class Prefit:
    """What MAPIE takes for a fitted classifier; its features are the probabilities."""

    def __init__(self, classes: int) -> None:
        self.classes_ = np.arange(classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, *_: object) -> "Prefit":
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features.argmax(axis=1)

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        return features


def mapie(conformity_score: object, coverage: float, calibration: tuple, seed: int = 3) -> object:
    classification = pytest.importorskip("mapie.classification", reason="MAPIE is the oracle")
    base = pytest.importorskip("sklearn.base")

    class Estimator(Prefit, base.ClassifierMixin, base.BaseEstimator):
        pass

    probabilities, labels = calibration
    return classification.SplitConformalClassifier(
        Estimator(probabilities.shape[1]),
        confidence_level=coverage,
        conformity_score=conformity_score,
        prefit=True,
        random_state=seed,
    ).conformalize(probabilities, labels)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("n", [60, 500])
def test_sets_of_lac_equal_mapies(coverage: float, n: int) -> None:
    probabilities, labels = world(12, n + 500, 10, sharpness=2.0)
    wide = probabilities.astype(np.float64)
    oracle = mapie("lac", coverage, (wide[:n], labels[:n]))
    table = ScoreTable.from_probabilities(probabilities[:n], labels[:n])
    np.testing.assert_allclose(oracle.conformity_scores.ravel(), table.lac, rtol=1e-14)
    np.testing.assert_array_equal(
        table.sets(probabilities[n:], coverage, allow_empty=True),
        oracle.predict_set(wide[n:])[1][:, :, 0],
    )


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_randomised_scores_and_sets_of_aps_equal_mapies(coverage: float) -> None:
    n = 500
    probabilities, labels = world(13, 1000, 10, sharpness=2.0)
    wide = probabilities.astype(np.float64)
    oracle = mapie("aps", coverage, (wide[:n], labels[:n]))
    # MAPIE's scores are randomised: they lack a share of the class's own probability.
    uniforms = np.random.RandomState(3).uniform(size=n)
    shares = uniforms * wide[np.arange(n), labels[:n]]
    scores = label_scores(probabilities[:n], labels[:n], "aps") - shares
    np.testing.assert_allclose(oracle.conformity_scores.ravel(), scores, rtol=1e-12, atol=1e-12)
    # MAPIE draws from the same seed again where it predicts.
    limit = quantile(scores, coverage)
    uniforms = np.random.RandomState(3).uniform(size=n)
    ours = class_scores(probabilities[n:], "aps") - uniforms[:, np.newaxis] * wide[n:]
    theirs = oracle.predict_set(wide[n:], {"include_last_label": "randomized"})[1][:, :, 0]
    np.testing.assert_array_equal(ours <= limit + 1e-9, theirs)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_scores_and_sets_of_raps_equal_mapies(coverage: float) -> None:
    raps = pytest.importorskip("mapie.conformity_scores", reason="MAPIE is the oracle")
    selection = pytest.importorskip("sklearn.model_selection")
    n = 500
    probabilities, labels = world(14, 1000, 10, sharpness=1.5)
    wide = probabilities.astype(np.float64)
    score = raps.RAPSConformityScore()
    oracle = mapie(score, coverage, (wide[:n], labels[:n]))
    theirs = oracle.predict_set(wide[n:])[1][:, :, 0]
    penalty = RapsPenalty(float(score.lambda_star), int(score.k_star[0]))
    # MAPIE takes some of the images for the penalty.
    split = selection.StratifiedShuffleSplit(1, test_size=score.size_raps, random_state=3)
    kept, for_penalty = next(split.split(wide[:n], labels[:n]))
    ranks = 1 + (
        probabilities[for_penalty] > probabilities[for_penalty, labels[for_penalty]][:, None]
    ).sum(axis=1)
    assert penalty.free_ranks == quantile(ranks.astype(float), coverage)
    uniforms = np.random.RandomState(3).uniform(size=len(kept))
    shares = uniforms * wide[kept, labels[kept]]
    own = label_scores(probabilities[kept], labels[kept], "raps", penalty) - shares
    assert quantile(own, coverage) == pytest.approx(float(score.quantiles_[0]), rel=1e-12)
    # By default MAPIE puts into a set each class before which the limit is not reached.
    scores = np.sort(class_scores(probabilities[n:], "raps", penalty), axis=1)
    sizes = 1 + (scores[:, :-1] < quantile(own, coverage)).sum(axis=1)
    np.testing.assert_array_equal(sizes, theirs.sum(axis=1))
