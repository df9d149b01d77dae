from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.data.datasets import read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.run.evaluate import evaluate_run
from capt_train.run.folder import load_run


def measured(report: dict[str, Any]) -> dict[str, Any]:
    return {scope: report[scope] for scope in ("base", "new", "all", "zero_shot", "uncalibrated")}


def test_a_run_evaluated_again_has_the_figures_of_its_training(
    finished: Path, photos: Path
) -> None:
    written = json.loads((finished / "metrics.json").read_text())
    assert measured(evaluate_run(finished, photos)) == measured(written)


def test_a_temperature_changes_confidence_and_not_accuracy(finished: Path, photos: Path) -> None:
    report = evaluate_run(finished, photos)
    raw_report = report["uncalibrated"]
    pairs = [(report, raw_report), (report["zero_shot"], raw_report["zero_shot"])]
    for calibrated, uncalibrated in pairs:
        for scope in ("base", "new", "all"):
            own, raw = calibrated[scope], uncalibrated[scope]
            assert own["accuracy"] == raw["accuracy"]
            assert own["nll"] != raw["nll"]


def test_both_models_are_measured_with_and_without_their_own_temperature(
    finished: Path, photos: Path
) -> None:
    model, dataset, report = (
        load_run(finished),
        read_dataset(photos),
        evaluate_run(finished, photos),
    )
    items = dataset.splits["test"]
    pixels = np.stack([preprocess(dataset.path(own), model.backbone.preprocess) for own in items])
    images = model.backbone.image_embeddings(torch.from_numpy(pixels))
    labels = torch.tensor([item.label for item in items])
    sides = [
        (model.class_rows.rows, model.fitted.temperature, report, report["uncalibrated"]),
        (
            model.zero_shot,
            model.fitted.zero_shot_temperature,
            report["zero_shot"],
            report["uncalibrated"]["zero_shot"],
        ),
    ]
    for text, temperature, calibrated, uncalibrated in sides:
        logits = model.backbone.scale * images @ text.T
        expected = cross_entropy(logits / temperature, labels).item()
        assert calibrated["all"]["nll"] == pytest.approx(expected, rel=1e-5)
        expected = cross_entropy(logits, labels).item()
        assert uncalibrated["all"]["nll"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_finds_the_embeddings_of_the_training(
    configure: Callable[..., TrainConfig],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CAPT_CACHE", str(tmp_path / "cache"))
    train(configure(method="zeroshot"), tmp_path / "run")
    assert "embedding test images: 20/20 images  20 new" in capsys.readouterr().err
    evaluate_run(tmp_path / "run", photos)
    assert "embedding test images: 20/20 images  0 new" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_data_set_with_some_of_the_classes_keeps_their_columns(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    """Without its first class, the labels of the data set are no longer those of the run."""
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    for split in ("train", "val", "test"):
        shutil.rmtree(own / split / "blue_sky")
    part, whole = evaluate_run(finished, own), evaluate_run(finished, photos)
    assert part["new"] == whole["new"]
    assert part["all"]["n"] == 15


def test_one_scope_alone_is_the_same_as_among_all(finished: Path, photos: Path) -> None:
    alone = evaluate_run(finished, photos, scope="new")
    assert alone["new"] == evaluate_run(finished, photos)["new"]
    assert alone["base"] is None


def test_unreadable_images_are_listed(finished: Path, photos: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    (own / "test" / "red_ball" / "0.png").write_bytes(b"no image")
    report = evaluate_run(finished, own)
    assert [path for path, _ in report["skipped"]] == ["test/red_ball/0.png"]
    assert report["all"]["n"] == 19


def test_a_split_without_a_readable_image_is_refused(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    for file in (own / "test").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"photos: none of the 20 test images is readable$"):
        evaluate_run(finished, own)
    assert evaluate_run(finished, own, split="val")["all"]["n"] == 16


USED = "among those that the run has used"


def test_test_images_that_the_run_has_seen_are_told_by_their_content(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(finished, photos)
    assert USED not in capsys.readouterr().err
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    split = json.loads((finished / "split.json").read_text())
    for number, part in enumerate(("train", "val")):
        shutil.copy(photos / split[part][-1][0], own / "test" / "red_ball" / f"new {number}.png")
    evaluate_run(finished, own)
    assert f"note: 2 test images are also {USED}" in capsys.readouterr().err


def test_neither_an_unused_image_nor_a_used_name_nor_another_split_is_told(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = {path for path, _, _ in json.loads((finished / "split.json").read_text())["train"]}
    unused = {path.relative_to(photos).as_posix() for path in photos.glob("train/*/*.png")} - used
    own = tmp_path / "photos"
    rows = ["path,label,split"]
    for path in sorted(used | unused):
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        # a used name has the content of a test image
        shutil.copy(photos / path.replace("train/", "test/").replace("5.png", "4.png"), own / path)
        if path in unused:
            shutil.copy(photos / path, own / path)
        rows.append(f"{path},{path.split('/')[1]},test")
    (own / "list.csv").write_text("\n".join(rows))
    assert len(used) == 6
    assert evaluate_run(finished, own / "list.csv")["all"]["n"] == 24
    evaluate_run(finished, photos, split="train")
    evaluate_run(finished, photos, split="val")
    assert USED not in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_refused(finished: Path, photos: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.rmtree(own / "val")
    with pytest.raises(DataError, match="no images in split 'val'"):
        evaluate_run(finished, own, split="val")
    (own / "test" / "red_ball").rename(own / "test" / "unknown")
    with pytest.raises(DataError, match="unknown"):
        evaluate_run(finished, own)


def test_a_scope_without_images_is_refused(finished: Path, photos: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("grey_stone", "red_ball"):
        shutil.rmtree(own / "test" / name)
    with pytest.raises(ConfigError, match="no images of 'new' classes"):
        evaluate_run(finished, own, scope="new")
