from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.errors import ConfigError, DataError
from capt_train.evaluate import evaluate_run


def measured(report: dict[str, Any]) -> dict[str, Any]:
    return {scope: report[scope] for scope in ("base", "new", "all", "zero_shot", "uncalibrated")}


def test_a_run_evaluated_again_has_the_figures_of_its_training(
    finished: Path, photos: Path
) -> None:
    written = json.loads((finished / "metrics.json").read_text())
    assert measured(evaluate_run(finished, photos)) == measured(written)


def test_a_temperature_changes_confidence_and_not_accuracy(finished: Path, photos: Path) -> None:
    report = evaluate_run(finished, photos)
    for scope in ("base", "new", "all"):
        own, raw = report[scope], report["uncalibrated"][scope]
        assert own["accuracy"] == raw["accuracy"]
        assert own["nll"] != raw["nll"]


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
