"""A run with map, closed-form rows, γ and δ: its bundle says what the run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from capt_deploy.core.errors import ConfigError
from capt_deploy.data.preprocess import preprocess
from capt_deploy.metrics.calibration import softmax
from capt_deploy.serving.classifier import Classifier
from capt_train.method.class_rows import discriminant
from capt_train.run.folder import TunedModel, load_run
from export.source.classes import untuned_rows
from export.source.merge import source_from_runs
from export.writer import ExportOptions, export_run
from tests.export.conftest import TEMPLATES

# a strong ridge: the names of a random model are so alike that a weak one amplifies rounding
PARTS = {"added": ("map", "rows"), "without": (), "rows_weight": 0.3, "map_ridge": 1.0}
SCALE, OFFSET = 1.4, 0.6  # γ and δ
NEW, BASE = "tabby cat", ["blue sky", "green leaf"]


@pytest.fixture(scope="module", params=["coop", "zeroshot"])
def runs(text_run: Callable[..., Path], request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Return two runs, with and without prompts, whose classes without photos have γ and δ."""
    parts = {"method": request.param, **PARTS}
    folders = text_run(**parts), text_run(**{**parts, "seed": 2, "rows_weight": 0.1})
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        result["outside"] = {"scale": SCALE, "offset": OFFSET}
        (folder / "result.json").write_text(json.dumps(result))
    return folders


@pytest.fixture(scope="module")
def model(runs: tuple[Path, Path]) -> TunedModel:
    return load_run(runs[0])


@pytest.fixture(scope="module")
def bundle(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "x.capt"
    return export_run(runs[0], out, options=ExportOptions(open_vocabulary=True))


def mapped_by_hand(model: TunedModel, names: list[str]) -> Tensor:
    """Return norm(t + tA), the mean over the prompts."""
    matrix = model.learner.state_dict()["transforms.map.matrix"]
    assert matrix.abs().max() > 1e-4
    texts = [prompt.of_names(names) for prompt in model.learner.prompts]
    texts = texts or [model.backbone.class_embeddings(names, TEMPLATES)]
    return torch.stack([normalize(t + t @ matrix, dim=-1) for t in texts]).mean(dim=0)


@torch.no_grad()
def logits_by_hand(model: TunedModel, photos: Path, images: Tensor, names: list[str]) -> Tensor:
    """Return METHOD 5b and 9 written out for classes in any order, known or new."""
    texts, centre = mapped_by_hand(model, names), mapped_by_hand(model, BASE).mean(dim=0)
    files = [photos / item.path for item in model.split.train]
    pixels = np.stack([preprocess(file, model.backbone.preprocess) for file in files])
    train = model.backbone.image_embeddings(torch.from_numpy(pixels))
    labels = torch.tensor([item.label for item in model.split.train])
    gaussian = discriminant(train, labels, len(BASE))
    columns = []
    for name, text in zip(names, texts, strict=True):
        if name not in BASE:
            columns.append(model.backbone.scale * images @ (centre + SCALE * (text - centre)))
            continue
        row = images @ gaussian.weight[BASE.index(name)] + gaussian.bias[BASE.index(name)]
        weight = model.config.rows.weight
        assert weight is not None
        columns.append(model.backbone.scale * images @ text + weight * row - OFFSET)
    return torch.stack(columns, dim=1) / model.fitted.temperature


def noise(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_logits_and_probabilities_of_the_bundle_are_those_of_the_run(
    model: TunedModel, bundle: Path, photos: Path
) -> None:
    assert {"map", "rows"} <= model.learner.parts(model.config)
    images = model.learner.image_embeddings(torch.from_numpy(noise()))
    expected = logits_by_hand(model, photos, images, list(model.class_names))
    torch.testing.assert_close(model.logits(images), expected, atol=1e-4, rtol=0)
    logits, probabilities, _ = Classifier.load(bundle).backend.run(noise())
    np.testing.assert_allclose(logits, model.logits(images).numpy(), atol=1e-4)
    np.testing.assert_allclose(probabilities, softmax(expected.numpy()), atol=1e-4)


def test_a_list_of_classes_may_have_new_ones(
    runs: tuple[Path, Path], model: TunedModel, photos: Path, tmp_path: Path
) -> None:
    names = [NEW, "red ball", "green leaf", "blue sky"]
    out = export_run(runs[0], tmp_path / "x.capt", class_names=names)
    images = model.learner.image_embeddings(torch.from_numpy(noise()))
    expected = logits_by_hand(model, photos, images, names)
    logits = Classifier.load(out).backend.run(noise())[0]
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


def test_a_class_added_to_the_bundle_has_the_row_of_the_run(
    model: TunedModel, bundle: Path, photos: Path
) -> None:
    classifier = Classifier.load(bundle)
    classifier.add_classes([NEW])
    images = model.learner.image_embeddings(torch.from_numpy(noise()))
    expected = logits_by_hand(model, photos, images, [*model.class_names, NEW])
    found = np.stack([p.probabilities for p in classifier.run(noise())])
    np.testing.assert_allclose(found, softmax(expected.numpy()), atol=1e-4)


def test_merged_runs_have_the_mean_of_their_rows_and_biases(
    runs: tuple[Path, Path], model: TunedModel, tmp_path: Path
) -> None:
    models = [model, load_run(runs[1])]
    rows, biases = (
        torch.stack([getattr(run.class_rows, name) for run in models]).mean(dim=0)
        for name in ("rows", "biases")
    )
    source = source_from_runs(models)
    torch.testing.assert_close(source.rows.rows, rows, atol=1e-6, rtol=0)
    torch.testing.assert_close(source.rows.biases, biases, atol=1e-6, rtol=0)
    assert biases[:2].abs().min() > 0.1 and not biases[2:].any()
    torch.testing.assert_close(rows[[3]], untuned_rows(models, ["red ball"]), atol=1e-6, rtol=0)
    out = export_run(runs, tmp_path / "x.capt", options=ExportOptions(open_vocabulary=True))
    logits, _, embedding = Classifier.load(out).backend.run(noise())
    expected = model.backbone.scale * embedding @ rows.numpy().T + biases.numpy()
    np.testing.assert_allclose(logits, expected / source.temperature, atol=1e-4)


def test_dac_is_refused_because_the_run_has_confidences_of_its_own(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    message = "--dac: the run's confidences .* are fitted on held-out classes already; leave --dac"
    with pytest.raises(ConfigError, match=message):
        export_run(runs[0], tmp_path / "x.capt", options=ExportOptions(distance_aware=True))
    assert not (tmp_path / "x.capt").exists()
