"""Every method trains, loads again with the same answers, and exports or says why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capt_deploy.core.errors import ConfigError
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from capt_train.config import TrainConfig
from capt_train.method.class_rows import UNCHANGED
from capt_train.methods import METHODS
from capt_train.pipeline import Trained, tune_and_measure
from capt_train.run.folder import load_run
from export.writer import export_run

PAPERS = [
    name for name, method in METHODS.items() if method.arxiv or name in ("tac", "class-means")
]
UNFOLDABLE = ("cocoop", "tip-adapter", "tip-adapter-f")
# methods that train something in the visual tower
BOTH_TOWERS = ("ivlp", "maple", "promptsrc", "tac", "clip-lora", "2sfs")


@pytest.fixture
def trained(
    configure: Callable[..., TrainConfig], tiny_model_dir: Path, tmp_path: Path
) -> Callable[..., Trained]:
    """Return a function that trains a method for two epochs into `tmp_path / "run"`."""

    def trained(name: str, **more: Any) -> Trained:
        start = configure(method="zeroshot", classes="base")
        few = {"tuning.epochs": 2, "tuning.batch_size": 4, "tuning.most_steps": 8}
        few |= {"visual.views": 2, "calibration.calibrator": "temperature"}
        if name in ("tac", "maple"):  # places in the tiny tower's 16 tokens
            few["prompt.words"] = "a photo"
        if "distillation" in METHODS[name].parts:
            few["distillation.teacher"] = f"local-dir:{tiny_model_dir}"
        return tune_and_measure(
            start.with_settings({"method": name, **few, **more}), tmp_path / "run"
        )

    return trained


@pytest.fixture
def without_val(photos: Path, tmp_path: Path) -> Path:
    """Return the photos without validation photos."""
    folder = tmp_path / "photos"
    for split in ("train", "test"):
        shutil.copytree(photos / split, folder / split)
    return folder


@torch.no_grad()
def answers(model: Any, photos: Path) -> np.ndarray:
    files = sorted((photos / "test").rglob("*.png"))
    pixels = np.stack([preprocess(file, model.backbone.preprocess) for file in files])
    images = model.learner.image_embeddings(torch.from_numpy(pixels))
    return model.logits(images).softmax(dim=1).numpy()


@pytest.mark.parametrize("name", PAPERS)
def test_a_method_trains_loads_and_exports(
    name: str, trained: Callable[..., Trained], photos: Path, tmp_path: Path
) -> None:
    done = trained(name)
    assert {*METHODS[name].parts} == {*done.report["parts"]}
    assert (done.model.visual is not None) == (name in BOTH_TOWERS)
    expected = answers(done.model, photos)
    loaded = load_run(tmp_path / "run")
    np.testing.assert_allclose(answers(loaded, photos), expected, rtol=0, atol=1e-6)
    out = tmp_path / "x.capt"
    if name in UNFOLDABLE:
        with pytest.raises(ConfigError, match=f"--method {name} cannot be exported: it"):
            export_run(tmp_path / "run", out)
        assert not out.exists()
        return
    predictions = Classifier.load(export_run(tmp_path / "run", out)).predict(
        sorted((photos / "test").rglob("*.png"))
    )
    found = np.stack([prediction.probabilities for prediction in predictions])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_method_of_both_towers_trains_both_in_one_stage(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    done = trained("maple")
    names = {name for name, _ in done.model.learner.named_parameters()}
    assert "prompts.0.deeper" in names and "tuner.parts.coupled-prompts.maps.0.weight" in names
    files = {file.name for file in (tmp_path / "run").glob("*.safetensors")}
    assert {"best.safetensors", "last.safetensors"} <= files
    assert not {name for name in files if name.startswith("text-")}


def test_the_terms_of_tcpt_change_what_a_method_learns(
    trained: Callable[..., Trained], photos: Path, tmp_path: Path
) -> None:
    plain = answers(trained("cocoop").model, photos)
    (tmp_path / "run").rename(tmp_path / "other")
    other = answers(trained("cocoop", added=("tcpt",)).model, photos)
    assert not np.allclose(plain, other, atol=1e-5)


@pytest.mark.parametrize("name", ["maple", "2sfs", "cocoop", "clap", "tip-adapter"])
def test_without_validation_photos_folds_of_the_whole_method_calibrate(
    name: str, trained: Callable[..., Trained], without_val: Path
) -> None:
    done = trained(name, data=str(without_val))
    assert len(done.held_out) == 6 and done.model.fitted.outside == UNCHANGED
    assert done.held_out.tuned.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual.joint": True, "method": "capt"}, "visual.joint: expected without map and rows"),
        (
            {"method": "cocoop", "added": ("mixture",)},
            "part image-prompt: expected without mixture",
        ),
        ({"method": "tac", "prompt.count": 2}, "part cluster-prompt: expected one context"),
        ({"method": "maple", "prompt.class_specific": True}, "part coupled-prompts: expected one"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig("", "").with_settings(settings)


def test_terms_on_rows_are_reported(trained: Callable[..., Trained]) -> None:
    assert {"margin", "moments", "clap"} == {*trained("clap", added=("tcpt",)).report["parts"]}


@pytest.mark.parametrize("name", ["promptsrc", "prograd", "tac"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    name: str,
    configure: Callable[..., TrainConfig],
    trained: Callable[..., Trained],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from capt_train.tune import tune

    expected = answers(trained(name).model, photos)
    (tmp_path / "run").rename(tmp_path / "whole")
    epochs = tune._next

    def stop(state: Any, *rest: Any) -> Any:
        if state.epoch == 1:
            raise KeyboardInterrupt
        return epochs(state, *rest)

    monkeypatch.setattr(tune, "_next", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(name)
    monkeypatch.undo()
    config = load_config(tmp_path / "run")
    done = tune_and_measure(config, tmp_path / "run", resume=True)
    np.testing.assert_array_equal(answers(done.model, photos), expected)


def load_config(run: Path) -> TrainConfig:
    from capt_train.run.folder import read_config

    return read_config(run)[0]
