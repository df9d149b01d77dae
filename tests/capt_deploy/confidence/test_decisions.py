"""Stored scores of images, and what is decided by them, each written out again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from capt_deploy.confidence import decisions
from capt_deploy.confidence.decisions import DecisionOptions, Decisions, partners
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.metrics.calibration import softmax

CLASSES, IMAGES = 4, 800


def drawn(seed: int, images: int = IMAGES) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return logits, their probabilities, and labels drawn from these."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (images, CLASSES))
    probabilities = softmax(logits)
    labels = np.array([random.choice(CLASSES, p=row) for row in probabilities])
    return logits, probabilities, labels


@pytest.fixture(scope="module")
def known() -> Decisions:
    logits, probabilities, labels = drawn(0)
    return Decisions.from_validation(probabilities, logits, labels)


def energies(logits: NDArray[Any]) -> list[float]:
    return [math.log(sum(math.exp(z) for z in row)) for row in logits]


def test_the_tables_are_those_of_the_images(known: Decisions) -> None:
    logits, probabilities, labels = drawn(0)
    assert known.images == IMAGES
    assert known.sets.labels.tolist() == labels.tolist()
    lac = [1 - row[label] for row, label in zip(probabilities, labels, strict=True)]
    np.testing.assert_allclose(known.sets.lac, lac, atol=1e-6)
    order = np.argsort(-probabilities.max(axis=1))
    assert known.rejection.confidence.tolist() == pytest.approx(
        probabilities.max(axis=1)[order].tolist(), abs=1e-7
    )
    assert (
        known.rejection.correct.tolist() == (probabilities.argmax(axis=1) == labels)[order].tolist()
    )
    np.testing.assert_allclose(known.familiarity.scores, sorted(energies(logits)), atol=1e-9)
    shares = np.bincount(probabilities.argmax(axis=1), minlength=CLASSES) / IMAGES
    np.testing.assert_allclose(known.reference.class_shares, shares)


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
@pytest.mark.parametrize("class_conditional", [False, True])
def test_they_come_back_from_bytes_and_decide_the_same(
    known: Decisions, method: Any, class_conditional: bool
) -> None:
    again = Decisions.from_arrays(load(save(known.arrays())), CLASSES)
    logits, probabilities, _ = drawn(1)
    options = DecisionOptions(0.8, method, class_conditional, accuracy=0.9, familiarity=0.05)
    one, other = (own.decide(probabilities, logits, options) for own in (known, again))
    for name in ("sets", "rejected", "familiarity"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name, array in known.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: np.array(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            (without(f"{name}"), name.split(".")[1])
            for name in (
                *("sets.labels", "sets.correct", "sets.lac", "sets.aps", "sets.raps"),
                *("sets.raps_penalty", "rejection.confidence", "rejection.correct"),
                *("familiarity.scores", "reference.confidence_histogram"),
                *("reference.class_shares", "reference.images"),
            )
        ],
        (put("sets.labels", np.full(IMAGES, CLASSES)), "not of 4 classes"),
        (put("sets.labels", np.full(IMAGES, -1)), "columns of classes"),
        (put("sets.labels", np.zeros(IMAGES)), "integer"),
        (put("sets.lac", np.full(IMAGES, np.nan)), "finite"),
        (put("sets.lac", np.zeros(IMAGES + 1)), "expected 800 float"),
        (put("sets.lac", np.zeros((IMAGES, 1))), "on one axis"),
        (put("rejection.correct", np.zeros(IMAGES)), "boolean"),
        (put("familiarity.scores", np.empty(0)), "at least one"),
        (put("familiarity.scores", np.zeros(7)), r"of 800 images, came scores of \[7, 800\]"),
        (put("reference.class_shares", [0.5, 0.5]), "not of 4 classes"),
        (put("reference.class_shares", [0.5, 0.5, 0.5, 0.5]), "sum to 1"),
        (put("reference.images", [799]), "of 799 images"),
        (put("reference.rejection_rate", [1.5]), "rejection rate"),
    ],
)
def test_arrays_that_cannot_be_scores_are_refused(
    known: Decisions, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    arrays = dict(known.arrays())
    change(arrays)
    with pytest.raises(BundleError, match=f"the scores of its validation images.*{message}"):
        Decisions.from_arrays(arrays, CLASSES)


def test_what_another_file_holds_is_refused(known: Decisions) -> None:
    for arrays in ({}, {"text_embeddings": np.zeros((4, 8), np.float32)}):
        with pytest.raises(BundleError, match="expected an array"):
            Decisions.from_arrays(arrays, CLASSES)
    for classes in (CLASSES - 1, CLASSES + 1):
        with pytest.raises(BundleError, match=f"not of {classes} classes"):
            Decisions.from_arrays(known.arrays(), classes)


def test_sets_hold_what_the_quantile_of_the_scores_lets_in(known: Decisions) -> None:
    logits, probabilities, _ = drawn(1)
    _, own, labels = drawn(0)
    for coverage in (0.8, 0.95):
        scores = sorted(
            -math.inf if row.argmax() == label else 1 - np.float32(row[label])
            for row, label in zip(own, labels, strict=True)
        )
        limit = scores[math.ceil((IMAGES + 1) * coverage) - 1]
        found = known.decide(probabilities, logits, DecisionOptions(coverage)).sets
        for row, inside in zip(probabilities.astype(np.float32), found, strict=True):
            expected = {c for c in range(CLASSES) if 1 - row[c] <= limit} | {int(row.argmax())}
            assert {*np.flatnonzero(inside)} == expected


def few(images: int) -> Decisions:
    logits, probabilities, labels = drawn(0, images)
    return Decisions.from_validation(probabilities, logits, labels)


def test_too_few_images_for_a_coverage_are_said_with_the_number_that_would_do() -> None:
    with pytest.warns(UserWarning, match="needs 99 held-out photos, and there are 98: every set"):
        few(98).check(DecisionOptions(coverage=0.99))
    probabilities = drawn(1)[1]
    assert few(98).sets.sets(probabilities, 0.99).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few(99).check(DecisionOptions(coverage=0.99))
    assert not few(99).sets.sets(probabilities, 0.99).all()


def test_classes_with_too_few_images_for_sets_of_their_own_are_counted(known: Decisions) -> None:
    scarce = few(40)
    counts = np.bincount(scarce.sets.labels)
    fewer = int((counts < 9).sum())
    assert 0 < fewer < CLASSES
    options = DecisionOptions(coverage=0.9, class_conditional=True)
    with pytest.warns(UserWarning, match=f"needs 9 .*; {fewer} of {CLASSES} classes have fewer"):
        scarce.check(options)
    always = scarce.sets.sets(drawn(1)[1], 0.9, class_conditional=True).all(axis=0)
    assert always.tolist() == (counts < 9).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.check(options)


def test_nothing_is_rejected_unless_it_is_asked_for(known: Decisions) -> None:
    logits, probabilities, _ = drawn(1)
    found = known.decide(probabilities, logits, DecisionOptions())
    assert found.rejected is None
    scores = energies(drawn(0)[0])
    expected = [(1 + sum(s <= e for s in scores)) / (IMAGES + 1) for e in energies(logits)]
    assert found.familiarity.tolist() == pytest.approx(expected)


def test_what_is_unsure_or_unfamiliar_is_rejected(known: Decisions) -> None:
    logits, probabilities, _ = drawn(1)
    confidence = probabilities.max(axis=1)
    threshold = known.rejection.threshold(0.95, 0.9)
    assert threshold is not None
    assert 0 < threshold < 1
    familiarity = known.decide(probabilities, logits, DecisionOptions()).familiarity
    unsure, strange = confidence < threshold, familiarity < 0.2
    assert unsure.any() and strange.any() and not unsure.all() and not strange.all()
    for options, expected in (
        (DecisionOptions(accuracy=0.95, certainty=0.9), unsure),
        (DecisionOptions(familiarity=0.2), strange),
        (DecisionOptions(accuracy=0.95, certainty=0.9, familiarity=0.2), unsure | strange),
    ):
        found = known.decide(probabilities, logits, options).rejected
        assert found is not None
        assert found.tolist() == expected.tolist()


def test_what_is_expected_of_rejection_is_what_happens(known: Decisions) -> None:
    assert known.baseline(DecisionOptions()).rejection_rate is None
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (20_000, CLASSES))
    logits += random.normal(0, 9, (20_000, 1))  # how familiar they are, apart from confidence
    probabilities = softmax(logits)
    labels = (random.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1).clip(0, 3)
    half = len(labels) // 2
    own = Decisions.from_validation(probabilities[:half], logits[:half], labels[:half])
    unfamiliar = own.decide(probabilities[half:], logits[half:], DecisionOptions(familiarity=0.1))
    assert unfamiliar.rejected is not None
    assert unfamiliar.rejected.mean() == pytest.approx(0.1, abs=0.02)
    # unsure and unfamiliar images are often the same ones, so that no rate is expected of both
    assert own.baseline(DecisionOptions(familiarity=0.1)).rejection_rate is None
    options = DecisionOptions(accuracy=0.95)
    found = own.decide(probabilities[half:], logits[half:], options).rejected
    assert found is not None
    expected = own.baseline(options).rejection_rate
    assert expected == pytest.approx(float(found.mean()), abs=0.03)
    accepted = ~found
    right = probabilities[half:].argmax(axis=1) == labels[half:]
    assert right[accepted].mean() >= 0.94 > right.mean()


def test_an_accuracy_that_cannot_be_promised_is_an_error_that_says_so(known: Decisions) -> None:
    with pytest.raises(ConfigError, match=r"accuracy 0.9999: with the 800 validation images"):
        known.threshold(DecisionOptions(accuracy=0.9999))
    logits, probabilities, _ = drawn(1)
    with pytest.raises(ConfigError, match="the most is"):
        known.decide(probabilities, logits, DecisionOptions(accuracy=0.9999))


def test_thresholds_are_remembered_but_not_without_end(
    known: Decisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    own = replace(known)
    plain = type(own.rejection).threshold

    def counting(table: Any, accuracy: float, level: float) -> float | None:
        asked.append(accuracy)
        return plain(table, accuracy, level)

    monkeypatch.setattr(type(own.rejection), "threshold", counting)
    monkeypatch.setattr(decisions, "_CACHED", 3)
    options = [DecisionOptions(accuracy=share / 100) for share in range(60, 66)]
    first = [own.threshold(one) for one in options]
    assert own.threshold(options[-1]) == first[-1]
    assert len(asked) == len(options)
    assert own._cached_threshold.cache_info().currsize <= 3
    assert [own.threshold(one) for one in options] == first


@pytest.mark.parametrize(
    "wrong",
    [
        {"coverage": 0.0},
        {"coverage": 1.0},
        {"coverage": 90},
        {"coverage": math.nan},
        {"accuracy": 0.0},
        {"accuracy": 1.0},
        {"accuracy": math.nan},
        {"certainty": 1.0},
        {"familiarity": -0.1},
        {"familiarity": 1.0},
        {"familiarity": math.nan},
        {"sets": "naive"},
    ],
)
def test_shares_outside_of_0_to_1_and_unknown_sets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        DecisionOptions(**wrong)


def test_the_class_taken_most_often_for_the_predicted_one_is_its_partner() -> None:
    pairs = [
        {"true": "otter", "predicted": "beaver", "count": 2},
        {"true": "seal", "predicted": "beaver", "count": 5},
        {"true": "whale", "predicted": "beaver", "count": 5},  # the first of equals
        {"true": "beaver", "predicted": "otter", "count": 1},
        {"true": "seal", "predicted": "whale"},
    ]
    names = ("beaver", "otter", "seal", "whale")
    assert partners(pairs, names) == {0: 2, 1: 0, 3: 2}
    assert partners([], names) == {}
