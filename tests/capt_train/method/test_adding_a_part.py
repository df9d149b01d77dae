"""The worked example of CONTRIBUTING: a part is one file and one entry of PARTS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import normalize

from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from capt_train import parts
from capt_train.cli.train import main
from capt_train.config import TrainConfig
from capt_train.parts import Part
from capt_train.pipeline import train
from capt_train.run.folder import TunedModel, load_run
from export.writer import export_run

EXAMPLES = "tests.capt_train.method.examples"
ENTRIES = {
    "linear-map": Part(
        "a linear map of class embeddings", "text", f"{EXAMPLES}.linear_map:LinearMap"
    ),
}
SETTINGS = {
    "tuning.epochs": 10,
    "tuning.learning_rate": 0.02,
    "tuning.label_noise": 0.0,
    "tuning.patience": 0,
    "visual.learning_rate": 0.02,
    "visual.strength": 1.0,
    "visual.views": 2,
    "calibration.calibrator": "temperature",
}
Trained = Callable[..., TunedModel]


@pytest.fixture
def trained(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Trained:
    """Return a function that tunes prompts with one of the new parts into `tmp_path / "run"`."""

    def trained(part: str, run: str = "run", **more: object) -> TunedModel:
        monkeypatch.setitem(parts.PARTS, part, ENTRIES[part])
        config = configure(method="coop", added=(part,))
        changes = {name.replace("__", "."): value for name, value in more.items()}
        train(config.with_settings({**SETTINGS, **changes}), tmp_path / run)
        return load_run(tmp_path / run)

    return trained


def files(photos: Path) -> list[Path]:
    return sorted((photos / "test").rglob("*.png"))


@torch.no_grad()
def images_of(model: TunedModel, photos: Path) -> torch.Tensor:
    pixels = [preprocess(file, model.backbone.preprocess) for file in files(photos)]
    return model.learner.image_embeddings(torch.from_numpy(np.stack(pixels)))


@torch.no_grad()
def assert_bundle_answers_like(model: TunedModel, bundle: Path, photos: Path) -> None:
    expected = model.logits(images_of(model, photos)).softmax(dim=1).numpy()
    predictions = Classifier.load(bundle).predict(files(photos))
    found = np.stack([prediction.probabilities for prediction in predictions])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_map_of_class_embeddings(trained: Trained, photos: Path, tmp_path: Path) -> None:
    model = trained("linear-map", classes="base")
    (update,) = model.learner.transforms.parameters()
    assert update.abs().max() > 1e-3
    assert_bundle_answers_like(model, export_run(tmp_path / "run", tmp_path / "x.capt"), photos)
    # a class that is not of the data set goes through the map too
    (prompt,) = model.learner.prompts
    with torch.no_grad():
        plain = prompt.of_names(["old tractor"])
        new = model.learner.texts_of(["old tractor"], plain).embeddings[0]
        torch.testing.assert_close(new, normalize(plain + plain @ update, dim=-1))
        assert not torch.allclose(new, plain, atol=1e-4)
    names = ("blue sky", "old tractor")
    bundle = export_run(tmp_path / "run", tmp_path / "new.capt", class_names=names)
    known = model.class_rows.rows[model.class_names.index("blue sky")]
    logits = model.backbone.scale * images_of(model, photos) @ torch.stack([known, new[0]]).T
    expected = (logits / model.fitted.temperature).softmax(dim=1).numpy()
    predictions = Classifier.load(bundle).predict(files(photos))
    found = np.stack([prediction.probabilities for prediction in predictions])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_help_lists_a_new_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PARTS, "linear-map", ENTRIES["linear-map"])
    assert "linear-map" in CliRunner().invoke(main, ["--help"]).stdout
