"""Factors of classes that a run was not tuned on, however they come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import normalize

from capt_deploy.bundle.manifest import OpenVocabulary
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.core.errors import BundleError, GateError
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.open_vocabulary import TextEncoder
from capt_train.method.class_rows import ClassRows
from capt_train.run.folder import TunedModel, load_run, mixed_rows
from export.source.classes import with_classes
from export.source.merge import source_from_runs
from export.source.model import Source, distance_aware, source_from_run
from export.text.graph import check_rows, write_open_vocabulary
from export.writer import ExportOptions, export
from tests.export.conftest import by_hand, shaken
from tests.export.distances import adjusted, coloured_noise, factor_by_hand, factors_by_hand

NEW = ("tabby cat", "Levi’s 501", "old tractor on a field")


@pytest.fixture(scope="module")
def source(text_model: TunedModel) -> Source:
    return distance_aware(source_from_run(text_model))


def test_a_list_of_new_classes_is_measured_to_those_tuned_on(
    source: Source, text_model: TunedModel
) -> None:
    names = ["tabby cat", "old tractor"]
    other = with_classes(source, [text_model], names)
    hand_written = text_model.backbone.class_embeddings(names, text_model.config.prompt.templates)
    tuned = torch.tensor(text_model.tuned)
    known = text_model.class_rows.rows[tuned], text_model.zero_shot[tuned]
    rows = [by_hand(text_model, name) for name in names]
    wanted = [factor_by_hand(*own, *known) for own in zip(rows, hand_written, strict=True)]
    assert other.calibration.factors is not None
    assert list(other.calibration.factors) == pytest.approx(wanted, rel=1e-5)
    assert max(abs(factor - 1) for factor in wanted) > 0.05
    # a class of the run keeps its factor in any list
    mixed = with_classes(source, [text_model], ["red ball", "tabby cat", "blue sky"])
    assert mixed.calibration.factors is not None
    own = factors_by_hand(text_model)[text_model.class_names.index("red ball")]
    assert list(mixed.calibration.factors) == pytest.approx([own, wanted[0], 1.0], rel=1e-5)


def test_images_that_tuning_has_moved_have_factors_of_their_texts(tuned_run: Path) -> None:
    model = load_run(tuned_run)
    model.learner.rows = None  # with rows, DAC is refused
    rows = mixed_rows(model.learner, model.zero_shot, model.split, model.fitted)
    model = replace(model, class_rows=rows)
    source = distance_aware(source_from_run(model))
    assert source.moves_images and source.calibration.factors is not None
    assert list(source.calibration.factors) == pytest.approx(factors_by_hand(model), rel=1e-5)
    listed = with_classes(source, [model], ["red ball", "tabby cat"])
    assert listed.calibration.factors is not None
    assert listed.calibration.factors[0] == pytest.approx(factors_by_hand(model)[3], rel=1e-5)


def test_merged_runs_are_measured_to_the_classes_of_all(
    text_run: Callable[..., Path], text_model: TunedModel
) -> None:
    # both tuned on the same two classes, with other weights and prompts
    models = [text_model, shaken(load_run(text_run(seed=5)), seed=1)]
    source = distance_aware(source_from_runs(models))
    rows = torch.stack([model.class_rows.rows for model in models]).mean(dim=0)
    both = replace(text_model, class_rows=ClassRows.from_texts(rows))
    assert source.tuned == text_model.tuned
    assert source.calibration.factors is not None
    assert list(source.calibration.factors) == pytest.approx(factors_by_hand(both), rel=1e-4)


@pytest.fixture(scope="module")
def open_models(text_run: Callable[..., Path], text_model: TunedModel) -> list[TunedModel]:
    """Return two runs, the second one with another template and no weight for it."""
    return [
        text_model,
        load_run(text_run(prompt_templates=("a drawing of a {}.",), prompt_count=1)),
    ]


@pytest.fixture(scope="module")
def open_dac(
    open_models: list[TunedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Path]:
    """Return both as one open bundle, without the classes that they were tuned on."""
    whole = distance_aware(source_from_runs(open_models))
    source = with_classes(whole, open_models, ["red ball", "silver spoon"])

    def begin(folder: Path) -> OpenVocabulary:
        return write_open_vocabulary(open_models, folder, source.class_names, hand_written=True)

    out = tmp_path_factory.mktemp("open") / "open.capt"
    return source, export(source, out, ExportOptions(), begin)


def test_adding_classes_is_exporting_with_them(
    open_dac: tuple[Source, Path], open_models: list[TunedModel], tmp_path: Path
) -> None:
    source, bundle = open_dac
    listed = with_classes(source, open_models, [*source.class_names, *NEW])
    added = Classifier.load(bundle)
    added.add_classes(NEW[:1])
    added.add_classes(NEW[1:])
    exported = Classifier.load(export(listed, tmp_path / "listed.capt", ExportOptions()))
    assert added.class_names == exported.class_names
    pixels = coloured_noise(50)
    wanted = exported.backend.run(pixels)
    head = added._predictor._classes.head
    assert head is not None and head.calibration.factors is not None
    np.testing.assert_allclose(head.logits(wanted.embedding), wanted.logits, atol=1e-4)
    # photos are taken for one class alone; random directions for all of them
    draw = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(300, 32, generator=draw), dim=1)
    assert listed.calibration.factors is not None
    plain = (images @ listed.head.weight.T + listed.head.bias).numpy()
    expected = adjusted(plain, list(listed.calibration.factors))
    assert len({*expected.argmax(axis=1)}) == 5
    assert min(abs(factor - 1) for factor in listed.calibration.factors) > 1e-3
    np.testing.assert_allclose(head.logits(images.numpy()), expected, atol=1e-4)
    for one, other in zip(added.run(pixels[:20]), exported.run(pixels[:20]), strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_the_text_graph_knows_the_hand_written_rows(
    open_dac: tuple[Source, Path],
    open_models: list[TunedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, bundle = open_dac
    outputs = [output.name for output in onnx.load(bundle / "text.onnx").graph.output]
    assert outputs == ["rows", "hand_written"]
    texts = TextEncoder.from_bundle(open_bundle(bundle))
    templates = [template for model in open_models for template in model.config.prompt.templates]
    wanted = open_models[0].backbone.class_embeddings(NEW, templates).numpy()
    np.testing.assert_allclose(texts.both_rows(NEW)[1], wanted, atol=1e-5)
    check_rows(texts, open_models, NEW, hand_written=True)
    other = normalize(torch.ones(len(NEW), 32))
    monkeypatch.setattr("export.text.graph.hand_written_rows", lambda *_: other)
    with pytest.raises(GateError, match="differ by"):
        check_rows(texts, open_models, NEW, hand_written=True)


def test_classes_cannot_be_added_where_their_factors_are_not_known(
    open_dac: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Classifier.load(open_dac[1])
    kept = open_bundle(open_dac[1]).text_embeddings()
    del kept["tuned_rows"]
    monkeypatch.setattr(Bundle, "text_embeddings", lambda _: kept)
    with pytest.raises(BundleError, match="no factors of further classes"):
        loaded.add_classes(["cat"])
