from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from capt_deploy.datasets import read_dataset
from capt_deploy.errors import CaptError, ConfigError, ModelError, RunError
from capt_deploy.preprocess import preprocess
from capt_train.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.features import Features
from capt_train.pipeline import mine_pairs, train
from capt_train.run import load_run, read_config

Configure = Callable[..., TrainConfig]
RUN_FILES = {
    "config.json",
    "split.json",
    "last.safetensors",
    "best.safetensors",
    "result.json",
    "metrics.json",
}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_run_folder_holds_what_is_documented_and_nothing_else(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == RUN_FILES


def test_metrics_have_zero_shot_beside_tuned_on_every_scope(finished: Path) -> None:
    report = read(finished / "metrics.json")
    sizes = {"base": 10, "new": 10, "all": 20}
    for part in (report, report["zero_shot"]):
        assert {scope: part[scope]["n"] for scope in sizes} == sizes
        assert 0 <= part["harmonic_mean"] <= 1
    assert report["split"] == "test"
    assert (report["method"], report["shots"], report["seed"]) == ("prompt", 3, 1)


def test_the_result_has_what_was_fitted_and_on_how_many_images(finished: Path) -> None:
    result, report = read(finished / "result.json"), read(finished / "metrics.json")
    assert result["images"] == report["images"] == {"train": 6, "val": 8}
    assert result["temperature"] == report["temperature"] != 1.0
    keys = {"temperature", "zero_shot_temperature", "images", "epochs", "best_epoch", "history"}
    assert result.keys() == keys | {"pairs"}
    assert result["epochs"] == len(result["history"]) == 3


def test_zero_shot_metrics_equal_a_prediction_by_hand(
    finished: Path, photos: Path, tiny_backbone: Backbone
) -> None:
    dataset = read_dataset(photos)
    text = tiny_backbone.text_embeddings([f"a photo of a {name}." for name in dataset.class_names])
    right = 0
    for item in dataset.splits["test"]:
        pixels = np.stack([preprocess(dataset.path(item), tiny_backbone.preprocess)])
        image = tiny_backbone.image_embeddings(torch.from_numpy(pixels))
        right += int((image @ text.T).argmax()) == item.label
    zero_shot = read(finished / "metrics.json")["zero_shot"]
    assert zero_shot["all"]["accuracy"] == pytest.approx(right / 20)


def test_each_model_has_the_best_temperature_for_validation_images_of_the_tuned_classes(
    finished: Path, photos: Path
) -> None:
    model, dataset = load_run(finished), read_dataset(photos)
    items = [item for item in dataset.splits["val"] if item.label < 2]
    pixels = np.stack([preprocess(dataset.path(own), model.backbone.preprocess) for own in items])
    images = model.backbone.image_embeddings(torch.from_numpy(pixels)).double()
    labels = torch.tensor([item.label for item in items])
    sides = [
        (model.text_embeddings, model.fitted.temperature),
        (model.zero_shot, model.fitted.zero_shot_temperature),
    ]
    for text, temperature in sides:
        logits = model.backbone.scale * images @ text[:2].double().T

        def cost(t: float, logits: torch.Tensor = logits) -> float:
            nll = cross_entropy(logits / t, labels, reduction="sum")
            return float(nll) + math.log(t) ** 2 / (2 * 0.5**2)

        assert min(torch.logspace(-1.3, 1.3, 200).tolist(), key=cost) == pytest.approx(
            temperature, rel=0.016
        )
        assert cost(temperature) < min(cost(0.98 * temperature), cost(1.02 * temperature))


def test_few_validation_images_are_noted(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("blue_sky", "green_leaf"):
        for number in range(21):
            Image.new("L", (8, 8), 5 * number).save(own / "val" / name / f"more {number}.png")
    config = configure(data=str(own), classes="base", method="zeroshot")
    report = train(config, tmp_path / "enough")
    assert report["images"]["val"] == 50
    assert "calibrated on no more" not in capsys.readouterr().err
    (own / "val" / "blue_sky" / "0.png").unlink()
    train(config, tmp_path / "few")
    note = "note: confidences are calibrated on no more than 49 validation images"
    assert note in capsys.readouterr().err.splitlines()


def test_mined_pairs_count_the_zero_shot_errors_among_tuned_classes() -> None:
    reference = torch.eye(3)
    images = Features(
        torch.eye(3)[[0, 1, 1, 2, 0]], torch.tensor([2, 2, 2, 6, 6])
    )  # classes 2, 4 and 6 are tuned
    assert mine_pairs(images, reference, [2, 4, 6]) == {(2, 4): 2, (6, 2): 1}


def test_a_zeroshot_run_tunes_nothing_and_equals_zero_shot(
    configure: Configure, tmp_path: Path
) -> None:
    report = train(configure(method="zeroshot"), tmp_path / "run")
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == RUN_FILES - {"last.safetensors", "best.safetensors"}
    assert report["all"]["accuracy"] == report["zero_shot"]["all"]["accuracy"]
    assert report["base"] is None


def test_a_second_run_with_the_same_seed_has_the_same_weights(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    train(configure(classes="base"), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    other = tmp_path / "other"
    train(configure(classes="base", seed=2), other)
    assert weights(other) != weights(finished)


def test_an_existing_run_is_not_overwritten(configure: Configure, finished: Path) -> None:
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    with pytest.raises(RunError, match="holds a run; continue it with --resume"):
        train(configure(classes="base"), finished)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_a_folder_with_other_files_is_not_used(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="already there and no run"):
        train(configure(), tmp_path)
    with pytest.raises(RunError, match="already there and no run"):
        train(configure(), tmp_path / "thesis.tex")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_split_from_uses_the_images_of_another_run(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    train(configure(classes="base", seed=5), tmp_path / "run", split_from=finished)
    assert read(tmp_path / "run" / "split.json") == read(finished / "split.json")
    with pytest.raises(RunError, match="nowhere"):
        train(configure(), tmp_path / "other", split_from=tmp_path / "nowhere")
    written = read_config(tmp_path / "run")[0]
    theirs = read_config(finished)[0]
    assert (written.classes, written.shots, written.seed) == (theirs.classes, theirs.shots, 5)
    with pytest.raises(ConfigError, match="split-from"):
        train(written, tmp_path / "run", resume=True, split_from=finished)


def test_without_test_images_it_measures_on_those_left_and_says_so(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos / "train", tmp_path / "photos" / "train")
    report = train(configure(data=str(tmp_path / "photos")), tmp_path / "run")
    assert report["split"] == "val"
    assert report["all"]["n"] == 12  # three spare images a class
    assert "measured on val images" in capsys.readouterr().err
    report = train(configure(data=str(tmp_path / "photos"), shots=6), tmp_path / "all shots")
    assert report["split"] == "train"
    assert report["temperature"] == 1.0
    assert read(tmp_path / "all shots" / "result.json")["zero_shot_temperature"] == 1.0
    assert report["images"] == {"train": 24, "val": 0}
    assert "calibrated on no more" not in capsys.readouterr().err


def test_a_model_named_like_a_folder_that_is_no_model_stays_an_architecture(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    with pytest.raises(ModelError, match="'ViT-B-16': pass --pretrained"):
        train(configure(model="ViT-B-16"), tmp_path / "run")


def test_a_failed_run_leaves_nothing_behind(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    bad = [
        {"data": str(tmp_path / "nowhere")},
        {"model": "local-dir:nowhere"},
        {"device": "cuda:99"},
        {"class_names": str(tmp_path / "names.json")},
    ]
    for settings in bad:
        with pytest.raises(CaptError):
            train(configure(**settings), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):  # the commands say it in one line
        train(configure(method="zeroshot"), tmp_path / "file" / "run")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
