"""What a predictor makes of a graph's outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.bundle.manifest import Manifest
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.confidence.decisions import DecisionOptions, Decisions
from capt_deploy.core.errors import BackendError, BundleError, ConfigError
from capt_deploy.metrics.calibration import softmax
from capt_deploy.serving.prediction import Prediction
from capt_deploy.serving.predictor import Predictor

NAMES = ("beaver", "otter", "seal")


@pytest.fixture(scope="module")
def manifest(golden: Path) -> Manifest:
    own = Manifest.from_dict(json.loads((golden / "manifest.json").read_text()), "golden")
    pairs = ({"true": "seal", "predicted": "otter", "count": 3},)
    calibration = {"fp32": {"temperature": 1.0}}
    names = {"class_names": NAMES, "tuned": (True,) * 3, "confusion_pairs": pairs}
    return replace(own, **names, calibration=calibration)


def drawn(
    seed: int, images: int, classes: int = 3
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    logits = np.random.default_rng(seed).normal(0, 2, (images, classes)).astype(np.float32)
    return softmax(logits).astype(np.float32), logits


@pytest.fixture(scope="module")
def known() -> Decisions:
    probabilities, logits = drawn(0, 800)
    random = np.random.default_rng(0)
    labels = [random.choice(3, p=row / row.sum()) for row in probabilities.astype(float)]
    return Decisions.from_validation(probabilities, logits, np.array(labels))


OPTIONS = DecisionOptions(coverage=0.8, accuracy=0.85, familiarity=0.1)


@dataclass(frozen=True)
class ScoredBundle(Bundle):
    """A bundle that exists in memory only."""

    scores: Decisions | None = None

    def decisions(self) -> Decisions | None:
        return self.scores


def make(
    manifest: Manifest, scores: Decisions | None, decisions: DecisionOptions | None = None
) -> Predictor:
    return Predictor(ScoredBundle(Path("x.capt"), manifest, scores=scores), decisions)


def predict(
    predictor: Predictor,
    probabilities: NDArray[np.float32],
    logits: NDArray[np.float32],
    options: DecisionOptions,
) -> list[Prediction]:
    return predictor.predictions(Outputs(logits, probabilities, probabilities), "fp32", options)


def test_each_image_gets_its_own_row_of_what_is_decided(
    manifest: Manifest, known: Decisions
) -> None:
    probabilities, logits = drawn(1, 60)
    found = predict(make(manifest, known), probabilities, logits, OPTIONS)
    decided = known.decide(probabilities, logits, OPTIONS)
    assert decided.rejected is not None
    assert {own.rejected for own in found} == {True, False}
    assert {len(own.prediction_set or ()) for own in found} >= {1, 2}
    for row, own in enumerate(found):
        assert own.label == NAMES[int(probabilities[row].argmax())]
        assert own.confidence == float(probabilities[row].max())
        assert own.class_names == NAMES
        inside = {NAMES[column] for column in np.flatnonzero(decided.sets[row])}
        assert own.prediction_set is not None
        assert {*own.prediction_set} == inside and len(own.prediction_set) == len(inside)
        shares = [probabilities[row][NAMES.index(name)] for name in own.prediction_set]
        assert shares == sorted(shares, reverse=True)
        assert own.prediction_set[0] == own.label
        assert own.rejected is bool(decided.rejected[row])
        assert own.familiarity == float(decided.familiarity[row])
        partner = ("seal", float(probabilities[row][2])) if own.label == "otter" else None
        assert own.confused_with == partner
        assert ("rejected=True" in repr(own)) == own.rejected


def test_without_scores_nothing_is_said_of_sets_and_rejection(manifest: Manifest) -> None:
    predictor = make(manifest, None)
    assert predictor.options(None, None) == DecisionOptions()
    for shares in ((0.8, None), (None, 0.9), (0.9, None)):
        with pytest.raises(BundleError, match="tune with two photos of each class or more"):
            predictor.options(*shares)
    with pytest.raises(BundleError, match="load the whole bundle"):
        lone = Bundle(Path("model.onnx"), manifest, StoredGraph(b"", "fp32"))
        Predictor(lone).options(0.8, None)
    probabilities, logits = drawn(1, 5)
    for own in predict(predictor, probabilities, logits, DecisionOptions()):
        assert (own.prediction_set, own.rejected, own.familiarity) == (None, None, None)
        assert (own.confused_with is not None) == (own.label == "otter")


def test_with_scores_what_cannot_be_promised_is_refused_before_any_image(
    manifest: Manifest, known: Decisions
) -> None:
    make(manifest, known, OPTIONS)
    with pytest.raises(ConfigError, match="the most is"):
        make(manifest, known, DecisionOptions(accuracy=0.9999))
    with pytest.raises(ConfigError, match="the most is"):
        make(manifest, known).options(None, 0.9999)


def test_added_classes_end_sets_and_rejection_and_this_is_said(golden: Path) -> None:
    pytest.importorskip("tokenizers")
    bundle = open_bundle(golden.with_name("open.capt"))
    probabilities, logits = drawn(0, 100, classes=4)
    scores = Decisions.from_validation(probabilities, logits, logits.argmax(axis=1))
    scored = ScoredBundle(bundle.path, bundle.manifest, scores=scores)
    with pytest.raises(BundleError, match="load it without `decisions`"):
        Predictor(scored, OPTIONS).add_classes(["zebra"], "fp32")
    predictor = Predictor(scored)
    predictor.options(0.8, None)
    with pytest.warns(UserWarning, match="prediction_set, rejected and familiarity are None"):
        predictor.add_classes(["zebra"], "fp32")
    assert predictor.class_names[-1] == "zebra"
    assert predictor.monitor().baseline is not None  # the bundle's classes can still be compared
    with pytest.raises(BundleError, match="there are none for the classes that were added"):
        predictor.options(0.8, None)
    embedding = np.eye(32, dtype=np.float32)[:2]
    outputs = Outputs(logits[:2], probabilities[:2], embedding)
    for own in predictor.predictions(outputs, "fp32", DecisionOptions()):
        assert len(own.probabilities) == 5
        assert (own.prediction_set, own.rejected, own.familiarity) == (None, None, None)


def test_options_of_a_call_change_the_usual_ones(manifest: Manifest, known: Decisions) -> None:
    predictor = make(manifest, known, OPTIONS)
    assert predictor.options(None, None) == OPTIONS
    assert predictor.options(0.7, None) == replace(OPTIONS, coverage=0.7)


def test_each_image_of_a_batch_can_have_options_of_its_own(
    manifest: Manifest, known: Decisions
) -> None:
    probabilities, logits = drawn(1, 60)
    predictor, wide = make(manifest, known), DecisionOptions(coverage=0.99)
    options = [wide if row % 3 == 0 else OPTIONS for row in range(60)]
    outputs = Outputs(logits, probabilities, probabilities)
    for row, own in enumerate(predictor.predictions_each(outputs, "fp32", options)):
        expected = predict(predictor, probabilities, logits, options[row])[row]
        assert own.to_dict(3) == expected.to_dict(3)


def test_the_monitor_counts_all_predictions(manifest: Manifest, known: Decisions) -> None:
    predictor = make(manifest, known, OPTIONS)
    probabilities, logits = drawn(1, 60)
    predict(predictor, probabilities, logits, OPTIONS)
    monitor = predictor.monitor()
    found = predict(predictor, probabilities, logits, OPTIONS)
    summary = monitor.summary()
    assert summary.images == 60
    assert summary.rejection_rate == pytest.approx(sum(bool(o.rejected) for o in found) / 60)
    assert summary.class_counts == {n: sum(o.label == n for o in found) for n in NAMES}
    # With another accuracy, rejections are not those that the monitor expects a share of
    predict(predictor, probabilities, logits, replace(OPTIONS, accuracy=0.3))
    assert monitor.summary().images == 120
    assert monitor.summary().rejection_rate == summary.rejection_rate


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scored", [True, False])
def test_answers_that_are_no_numbers_are_an_error_that_says_so(
    manifest: Manifest, known: Decisions, bad: float, scored: bool
) -> None:
    probabilities, logits = drawn(1, 4)
    probabilities[2] = bad
    predictor = make(manifest, known if scored else None)
    monitor = predictor.monitor()
    with pytest.raises(BackendError, match="to 1 of 4 images are not numbers"):
        predict(predictor, probabilities, logits, DecisionOptions())
    assert monitor.summary().images == 0


def test_no_images_get_no_predictions(manifest: Manifest, known: Decisions) -> None:
    none = np.empty((0, 3), np.float32)
    assert predict(make(manifest, known), none, none, OPTIONS) == []


def test_the_most_probable_classes_come_first_and_ties_in_their_order() -> None:
    shares: Any = np.array([0.3, 0.1, 0.3, 0.3], np.float32)
    own = Prediction("a", 0.3, shares, ("a", "b", "c", "d"))
    assert [name for name, _ in own.top(3)] == ["a", "c", "d"]
    assert own.top(9)[-1] == ("b", pytest.approx(0.1))
