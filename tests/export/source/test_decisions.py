"""What a bundle stores of its validation images, computed again image by image."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from capt_deploy.bundle.read import CALIBRATION
from capt_deploy.confidence.decisions import DecisionOptions, Decisions
from capt_deploy.serving.classifier import Classifier
from capt_train.calibrate import choose
from capt_train.calibrate.choose import fit_calibration
from capt_train.calibrators import CALIBRATORS
from capt_train.data.validation import Validation
from capt_train.method.class_rows import ClassRows
from capt_train.run.folder import TunedModel, load_run
from export.source import decisions
from export.source.classes import with_classes
from export.source.decisions import decisions_from_validation
from export.source.merge import source_from_runs
from export.source.model import distance_aware, source_from_run
from export.writer import ExportOptions, export
from tests.export.distances import adjusted, coloured_noise

IMAGES = 60


@torch.no_grad()
def known(model: TunedModel, kind: str = "temperature") -> TunedModel:
    """Return the run with validation images of noise: labels of the tuned classes, by chance."""
    images = model.learner.image_embeddings(torch.from_numpy(coloured_noise(IMAGES)))
    tuned = torch.tensor(model.split.tuned)
    labels = tuned[torch.randint(len(tuned), (IMAGES,), generator=torch.Generator().manual_seed(0))]
    raw = model.raw_logits(images)[:, tuned].double().numpy()
    own = fit_calibration(kind, raw, torch.searchsorted(tuned, labels).numpy())
    fitted = replace(model.fitted, calibration=own)
    return replace(model, validation=Validation(images, labels), fitted=fitted)


def out_of_fold(
    model: TunedModel, rows: NDArray[Any], columns: list[int], factors: list[float] | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logits without any temperature, and probabilities by calibrations of four fifths."""
    assert model.validation is not None
    images, labels = model.validation.embeddings.numpy(), model.validation.labels.numpy()
    kind, tuned = model.fitted.calibration.calibrator, [*model.split.tuned]
    z = model.backbone.scale * images.astype(float) @ rows.T.astype(float)
    own_rows = model.class_rows.rows.detach().numpy()[tuned].astype(float)
    own_z = model.backbone.scale * images.astype(float) @ own_rows.T
    own_labels = np.array([tuned.index(label) for label in labels])
    folds = np.zeros(len(labels), int)
    for place, image in enumerate(sorted(range(len(labels)), key=lambda i: (own_labels[i], i))):
        folds[image] = place % 5
    logits, probabilities = np.zeros(z.shape), np.zeros(z.shape)
    for fold in range(5):
        held = folds == fold
        own = fit_calibration(kind, own_z[~held], own_labels[~held])
        part = z[held]
        if own.vector is not None:
            a = [own.vector.scales[c] if c < len(tuned) else 1 for c in columns]
            b = [own.vector.biases[c] if c < len(tuned) else 0 for c in columns]
            part = part * a + b
        part = part / own.temperature
        logits[held] = part if factors is None else adjusted(part, factors)
        probabilities[held] = own.probabilities(logits[held])
    final = model.fitted.calibration.vector
    if final is not None:
        a = [final.scales[c] if c < len(tuned) else 1 for c in columns]
        b = [final.biases[c] if c < len(tuned) else 0 for c in columns]
        z = z * a + b
    return (z if factors is None else adjusted(z, factors)), probabilities


def check(found: Decisions | None, logits: Any, probabilities: Any, labels: Any) -> None:
    assert found is not None
    assert found.images == len(labels)
    assert found.sets.labels.tolist() == labels.tolist()
    lac = [1 - row[label] for row, label in zip(probabilities, labels, strict=True)]
    np.testing.assert_allclose(found.sets.lac, lac, atol=1e-4)
    np.testing.assert_allclose(
        found.rejection.confidence, -np.sort(-probabilities.max(axis=1)), atol=1e-4
    )
    assert found.rejection.correct.sum() == (probabilities.argmax(axis=1) == labels).sum()
    energies = sorted(math.log(sum(math.exp(z) for z in row)) for row in logits)
    np.testing.assert_allclose(found.familiarity.scores, energies, atol=1e-3)


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_scores_are_those_of_calibrations_that_have_not_seen_the_image(
    kind: str, whole_model: TunedModel
) -> None:
    model = known(whole_model, kind)
    assert model.validation is not None
    source = source_from_run(model)
    own = out_of_fold(model, source.rows.rows.numpy(), [*range(4)])
    check(decisions_from_validation(source), *own, model.validation.labels.numpy())


def test_logits_of_images_that_were_tuned_on_are_those_out_of_fold(whole_model: TunedModel) -> None:
    model = known(whole_model, "temperature")
    assert model.validation is not None
    embeddings, rows = model.validation.embeddings, model.class_rows.rows.roll(1, dims=1)
    logits = model.backbone.scale * embeddings @ rows.T
    model = replace(model, validation=replace(model.validation, logits=logits))
    rolled = replace(model, class_rows=ClassRows.from_texts(rows))
    unscaled, probabilities = out_of_fold(rolled, rows.numpy(), [*range(4)])
    # what is added to all logits of an image is that of the run's own rows
    images = embeddings.double().numpy()
    own = model.backbone.scale * images @ model.class_rows.rows.double().numpy().T
    columns = [*model.split.tuned]
    shift = own[:, columns].mean(axis=1) - unscaled[:, columns].mean(axis=1)
    unscaled[:, columns] += shift[:, None]
    labels = model.validation.labels.numpy()
    check(decisions_from_validation(source_from_run(model)), unscaled, probabilities, labels)


def test_what_a_fold_adds_to_all_logits_of_an_image_changes_nothing(
    whole_model: TunedModel,
) -> None:
    model = known(whole_model, "temperature")
    assert model.validation is not None
    logits = model.raw_logits(model.validation.embeddings)[:, list(model.split.tuned)]
    added = logits + 50 * torch.arange(IMAGES)[:, None]
    found = [
        decisions_from_validation(
            source_from_run(replace(model, validation=replace(model.validation, logits=z)))
        )
        for z in (logits, added)
    ]
    plain, shifted = (decisions.arrays() for decisions in found if decisions is not None)
    for name, values in plain.items():
        if values.dtype == bool:  # in the order of confidences, which rounding may swap
            assert shifted[name].sum() == values.sum(), name
        else:
            np.testing.assert_allclose(shifted[name], values, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_factors_of_distance_aware_calibration_are_in_them(
    kind: str, text_model: TunedModel
) -> None:
    model = known(text_model, kind)
    assert model.validation is not None
    source = distance_aware(source_from_run(model))
    assert source.calibration.factors is not None
    own = out_of_fold(model, source.rows.rows.numpy(), [*range(4)], [*source.calibration.factors])
    check(decisions_from_validation(source), *own, model.validation.labels.numpy())


@pytest.mark.parametrize("kind", ["temperature", "vector"])
def test_lists_of_classes_have_the_images_of_their_own(kind: str, whole_model: TunedModel) -> None:
    model = known(whole_model, kind)
    assert model.validation is not None
    names = ["tabby cat", model.class_names[3], model.class_names[1]]
    source = with_classes(source_from_run(model), [model], names)
    logits, probabilities = out_of_fold(model, source.rows.rows.numpy(), [4, 3, 1])
    labels = model.validation.labels.numpy()
    kept = np.isin(labels, [1, 3])
    assert 10 < kept.sum() < IMAGES
    places = np.array([{3: 1, 1: 2}[label] for label in labels[kept]])
    check(decisions_from_validation(source), logits[kept], probabilities[kept], places)


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_the_label_of_an_image_does_not_change_what_it_gets(
    kind: str, whole_model: TunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = known(whole_model, kind)
    assert model.validation is not None
    monkeypatch.setattr(choose, "_folds", lambda labels: np.arange(len(labels)) % 5)
    got: list[tuple[Any, Any]] = []

    class Noting:
        @staticmethod
        def from_validation(probabilities: Any, logits: Any, labels: Any) -> None:
            got.append((probabilities, logits))

    monkeypatch.setattr(decisions, "Decisions", Noting)
    other = model.validation.labels.clone()
    other[7] = (other[7] + 1) % 4
    for labels in (model.validation.labels, other):
        validation = Validation(model.validation.embeddings, labels)
        decisions_from_validation(source_from_run(replace(model, validation=validation)))
    same_fold = np.arange(IMAGES) % 5 == 7 % 5
    (before, energies), (after, others) = got
    np.testing.assert_array_equal(before[same_fold], after[same_fold])
    assert not np.array_equal(before[~same_fold], after[~same_fold])
    np.testing.assert_array_equal(energies, others)  # labels are not in these


def test_few_images_or_none_are_no_ground_to_decide_on(
    text_run: Any, text_model: TunedModel, whole_model: TunedModel, capsys: Any
) -> None:
    assert decisions_from_validation(source_from_run(replace(whole_model, validation=None))) is None
    assert "no prediction sets and no rejection" in capsys.readouterr().err
    assert decisions_from_validation(source_from_run(text_model)) is None  # 8 images of its own
    model = known(whole_model)
    assert model.validation is not None
    for count, there in ((9, False), (10, True)):
        few = Validation(model.validation.embeddings[:count], model.validation.labels[:count])
        assert (
            decisions_from_validation(source_from_run(replace(model, validation=few))) is not None
        ) == there
    new = with_classes(source_from_run(model), [model], ["tabby cat", "old tractor"])
    assert decisions_from_validation(new) is None
    assert (
        decisions_from_validation(source_from_runs([text_model, load_run(text_run(seed=5))]))
        is None
    )


@pytest.fixture(scope="module")
def bundle(whole_model: TunedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = {(1, 0): 3, (2, 0): 1}  # class 0 is called, 1 is meant
    model = known(whole_model, "line")
    model = replace(model, fitted=replace(model.fitted, pairs=pairs))
    out = tmp_path_factory.mktemp("decisions") / "x.capt"
    return export(source_from_run(model), out, ExportOptions())


def test_predictions_of_a_bundle_are_decided_by_its_scores(bundle: Path) -> None:
    arrays = load_file(bundle / CALIBRATION)
    wanted = DecisionOptions(coverage=0.7, familiarity=0.3)
    loaded = Classifier.load(bundle, decisions=wanted)
    pixels = coloured_noise(90)[60:]  # which no calibration has seen
    outputs = loaded.backend.run(pixels)
    scores = np.where(arrays["sets.correct"], -np.inf, arrays["sets.lac"])
    limit = np.sort(scores)[math.ceil(0.7 * (IMAGES + 1)) - 1]
    rejected = 0
    temperature = loaded.manifest.calibration["fp32"]["temperature"]
    for own, shares, z in zip(
        loaded.run(pixels), outputs.probabilities, outputs.logits, strict=True
    ):
        order = np.argsort(-shares, kind="stable")
        inside = [c for c in order if c == order[0] or 1 - shares[c] <= limit]
        assert own.prediction_set == tuple(loaded.class_names[c] for c in inside)
        energy = np.log(np.exp(z.astype(float) * temperature).sum())
        value = (1 + (arrays["familiarity.scores"] <= energy).sum()) / (IMAGES + 1)
        assert own.familiarity == pytest.approx(value)
        assert own.rejected is bool(value < 0.3)
        rejected += bool(own.rejected)
        partner = (loaded.class_names[1], pytest.approx(float(shares[1])))
        assert own.confused_with == (partner if order[0] == 0 else None)
    assert loaded.monitor().baseline is not None
    assert loaded.monitor().baseline.rejection_rate is None  # not to be known of familiarity


def test_a_lone_graph_decides_nothing(bundle: Path) -> None:
    own = Classifier.load(bundle / "model.onnx").run(coloured_noise(1))[0]
    assert (own.prediction_set, own.rejected, own.familiarity) == (None, None, None)
