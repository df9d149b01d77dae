"""Distillation from a teacher: a model or a run, on photos without labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capt_deploy.core.errors import CaptError, ConfigError, DataError
from capt_train.config import TrainConfig
from capt_train.pipeline import Trained, train, tune_and_measure
from capt_train.run.folder import load_run
from tests.configs import changed

FEW = {"tuning_epochs": 30, "tuning_batch_size": 8}


@pytest.fixture(scope="module")
def teacher(write_model: Callable[..., Path]) -> Path:
    """Return a wider model with other weights."""
    return write_model(seed=5, embed_dim=48)


@pytest.fixture
def student(configure: Callable[..., TrainConfig], teacher: Path) -> Callable[..., TrainConfig]:
    """Return a function for configurations of a distilled run."""

    def student(**more: Any) -> TrainConfig:
        start = configure(method="zeroshot", classes="base")
        own = start.with_settings({"method": "promptkd", "distillation.teacher": str(teacher)})
        return changed(own, **{**FEW, **more})

    return student


def disagreement(done: Trained, photos: Path, teacher: Path) -> float:
    """Return the mean KL of the student from the teacher on the training photos."""
    import numpy as np

    from capt_deploy.data.preprocess import preprocess
    from capt_train.clip.loading import load_backbone

    big = load_backbone(str(teacher), None, torch.device("cpu"))
    files = sorted((photos / "train").rglob("*.png"))
    with torch.no_grad():
        both = []
        for backbone in (big, done.model.backbone):
            pixels = np.stack([preprocess(file, backbone.preprocess) for file in files])
            both.append(backbone.image_embeddings(torch.from_numpy(pixels)))
        texts = big.class_embeddings(done.model.class_names, ["a photo of a {}."])
        answers = (big.scale * both[0] @ texts.T).log_softmax(1)
        found = done.model.raw_logits(both[1]).log_softmax(1)
        return float((answers.exp() * (answers - found)).sum(1).mean())


def test_a_student_comes_near_its_teacher_without_labels(
    student: Callable[..., TrainConfig], teacher: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unlabelled"
    for file in sorted((photos / "train").rglob("*.png")):
        (folder).mkdir(exist_ok=True)
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    start = tune_and_measure(
        student(distillation_unlabelled=str(folder), losses_distillation=1e-9), tmp_path / "start"
    )
    done = tune_and_measure(student(distillation_unlabelled=str(folder)), tmp_path / "run")
    assert disagreement(done, photos, teacher) < 0.8 * disagreement(start, photos, teacher)
    hashes = json.loads((tmp_path / "run" / "unlabelled.json").read_text())["photos"]
    assert len(hashes) == len(list(folder.iterdir()))
    assert done.report["transductive"] == 0
    loaded = load_run(tmp_path / "run")
    assert torch.equal(loaded.class_rows.rows, done.model.class_rows.rows)
    assert loaded.unlabelled == {*hashes}


def test_test_photos_without_labels_are_called_transductive(
    student: Callable[..., TrainConfig],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = student(distillation_unlabelled=str(photos / "test"))
    report = train(config, tmp_path / "run")
    assert report["transductive"] == len(list((photos / "test").rglob("*.png")))
    assert "note: transductive: 20 test images are among the photos" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_teacher_and_its_photos(
    student: Callable[..., TrainConfig], photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from capt_train.tune import tune

    config = student(distillation_unlabelled=str(photos / "train"), tuning_epochs=3)
    expected = tune_and_measure(config, tmp_path / "whole").model.class_rows.rows
    epochs = tune._next

    def stop(state: Any, *rest: Any) -> Any:
        if state.epoch == 1:
            raise KeyboardInterrupt
        return epochs(state, *rest)

    monkeypatch.setattr(tune, "_next", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    other = changed(config, distillation_unlabelled=str(photos / "test"))
    with pytest.raises(CaptError, match="was begun with other photos without labels"):
        train(other, tmp_path / "run", resume=True)
    found = tune_and_measure(config, tmp_path / "run", resume=True).model.class_rows.rows
    assert torch.equal(found, expected)


def test_parts_that_need_labels_are_refused(student: Callable[..., TrainConfig]) -> None:
    for name in ("map", "clap", "mixture", "lora"):
        with pytest.raises(ConfigError, match=f"part distillation: expected without {name}"):
            student(added=(name,))


def test_without_unlabelled_photos_it_learns_from_the_training_photos(
    student: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(student(tuning_epochs=1), tmp_path / "run")
    assert "learning from the training photos, without their labels" in capsys.readouterr().err


def test_a_run_can_be_the_teacher(
    configure: Callable[..., TrainConfig], student: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(configure(method="rows", classes="all"), tmp_path / "teacher")
    done = tune_and_measure(
        student(distillation_teacher=str(tmp_path / "teacher"), tuning_epochs=60), tmp_path / "run"
    )
    rows = load_run(tmp_path / "teacher").class_rows.rows
    prompt = done.model.learner.prompts[0]
    torch.testing.assert_close(prompt.teacher, torch.nn.functional.normalize(rows, dim=-1))


def test_capt_on_top_of_a_teacher_has_its_contrast_and_experts(
    student: Callable[..., TrainConfig], teacher: Path, configure: Any, tmp_path: Path
) -> None:
    own = configure(method="zeroshot", classes="base").with_settings(
        {"method": "capt-promptkd", "distillation.teacher": str(teacher), "tuning.epochs": 1}
    )
    report = train(own, tmp_path / "run")
    assert {"distillation", "infonce", "semantic-experts"} <= {*report["parts"]}
    terms = json.loads((tmp_path / "run" / "result.json").read_text())["stages"][0]["history"][0]
    assert {"distillation", "infonce"} <= {*terms} and "cross_entropy" not in terms


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"distillation_teacher": "no-such-model"}, CaptError, "no-such-model"),
        ({"distillation_unlabelled": "/no/folder"}, DataError, "--unlabelled /no/folder: expected"),
    ],
)
def test_a_teacher_or_photos_that_are_not_there_are_an_error(
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    student: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(student(**settings), tmp_path / "run")


def test_a_run_of_other_classes_is_no_teacher(
    configure: Callable[..., TrainConfig],
    student: Callable[..., TrainConfig],
    photos: Path,
    tmp_path: Path,
) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(photos, renamed)
    for split in renamed.iterdir():
        first = sorted(split.iterdir())[0]
        first.rename(first.with_name("zebra"))
    train(configure(method="rows", data=str(renamed)), tmp_path / "teacher")
    with pytest.raises(ConfigError, match="expected a run with all class names of the data"):
        train(student(distillation_teacher=str(tmp_path / "teacher")), tmp_path / "run")
