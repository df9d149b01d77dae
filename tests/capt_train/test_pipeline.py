from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from capt_deploy.datasets import read_dataset
from capt_deploy.errors import CaptError, ConfigError, DataError, ModelError, RunError
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
    assert report["temperature"] == read(finished / "result.json")["temperature"]


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


def test_temperature_is_the_best_for_validation_images_of_the_tuned_classes(
    finished: Path, photos: Path
) -> None:
    model, dataset = load_run(finished), read_dataset(photos)
    items = [item for item in dataset.splits["val"] if item.label < 2]
    pixels = np.stack([preprocess(dataset.path(own), model.backbone.preprocess) for own in items])
    logits = model.logits(model.backbone.image_embeddings(torch.from_numpy(pixels)))[:, :2]
    labels = torch.tensor([item.label for item in items])
    best = cross_entropy(logits.double(), labels)
    assert 0.05 < model.temperature < 20
    for factor in (0.98, 1.02):
        assert cross_entropy(logits.double() * factor, labels) > best


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


def test_resume_with_other_settings_is_refused_and_names_them(
    configure: Configure, finished: Path
) -> None:
    with pytest.raises(RunError, match=r"other settings: shots 3 → 2; epochs 3 → 9$"):
        train(configure(classes="base", shots=2, epochs=9), finished, resume=True)


def test_resume_of_a_finished_run_changes_no_weights(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    report = train(configure(classes="base"), run, resume=True)
    assert weights(run) == weights(finished)
    assert report == read(finished / "metrics.json")


def test_resume_of_nothing_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        train(configure(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resume_notices_changed_data_and_a_changed_model(
    configure: Configure, photos: Path, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    model = Path(shutil.copytree(write_model(seed=1), tmp_path / "model"))
    config = configure(data=str(own), model=f"local-dir:{model}", method="zeroshot")
    train(config, tmp_path / "run")
    shutil.rmtree(model)
    shutil.copytree(write_model(seed=2), model)
    with pytest.raises(RunError, match="begun with another model"):
        train(config, tmp_path / "run", resume=True)
    (own / "val" / "red_ball" / "0.png").unlink()
    with pytest.raises(DataError, match="1 of the run's"):
        train(config, tmp_path / "run", resume=True)


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


def test_a_model_named_like_a_folder_that_is_no_model_stays_an_architecture(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    with pytest.raises(ModelError, match="'ViT-B-16': pass --pretrained"):
        train(configure(model="ViT-B-16"), tmp_path / "run")


def test_paths_of_a_run_do_not_depend_on_the_folder_it_was_started_in(
    configure: Configure, photos: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(photos.parent)
    config = configure(
        data=photos.name,
        model=f"../{tiny_model_dir.relative_to(photos.parent.parent)}",
        method="zeroshot",
    )
    train(config, tmp_path / "run")
    written = read(tmp_path / "run" / "config.json")["config"]
    assert written["data"] == str(photos)
    assert written["model"] == f"local-dir:{tiny_model_dir}"
    monkeypatch.chdir(tmp_path)
    train(TrainConfig.from_dict(written, CaptError), tmp_path / "run", resume=True)


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
    with pytest.raises(RunError, match="cannot be written"):
        train(replace(configure(), method="zeroshot"), tmp_path / "file" / "run")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
