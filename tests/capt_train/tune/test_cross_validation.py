"""Each training image is asked about by a model that was not tuned on it."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.method.learner import Learner
from capt_train.pipeline import train
from capt_train.run.folder import load_run
from capt_train.tune import cross_validation, text_side
from capt_train.tune import folds as folds_module
from capt_train.tune.cross_validation import out_of_fold_logits
from capt_train.tune.stages import Stage, TuningTask
from capt_train.tune.tune import tune
from tests.capt_train.tune.test_strength import config, learner, make, numbered, without_val
from tests.configs import train_config

TUNED = (0, 1, 3, 4, 6)


def logits_of(made: Learner, images: Tensor) -> Tensor:
    return made.logits(images, TUNED) + made.backbone.logit_bias


def fresh(backbone: Backbone, task: TuningTask) -> Callable[[tuple[int, ...]], Learner]:
    return lambda tuned: learner(backbone, task.config, tuned)


def every(task: TuningTask) -> Tensor:
    return torch.arange(len(task.train))


def some(task: TuningTask, per_class: int) -> TuningTask:
    """Return the task with that many images of each class."""
    labels = task.train.labels
    same = (labels[:, None] == labels[None, :]).tril(-1).sum(dim=1)
    return task.with_rows(same < per_class)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Learner, TuningTask, Stage]]:
    """Note what would be tuned, without tuning it."""
    found: list[tuple[Learner, TuningTask, Stage]] = []

    def noting(
        made: Learner, task: TuningTask, folder: Path, stage: Stage, label: str = ""
    ) -> tuple[None, None]:
        found.append((made, task, stage))
        return None, None

    monkeypatch.setattr(cross_validation, "tune", noting)
    monkeypatch.setattr(text_side, "tune", noting)
    return found


@pytest.mark.parametrize(("strength", "folds"), [(0.5, 2), (0.0, 4)])
@pytest.mark.parametrize("per_class", [4, 3, 2])
def test_no_model_is_asked_about_an_image_that_it_was_tuned_on(
    strength: float,
    folds: int,
    per_class: int,
    tiny_backbone: Backbone,
    noted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, task = make(tiny_backbone)
    task = some(without_val(numbered(task)), per_class)
    asked: list[tuple[Learner, list[float]]] = []
    plain = cross_validation._images

    def noting(made: Learner, own: TuningTask, chosen: Tensor) -> Tensor:
        asked.append((made, own.train.embeddings[chosen, 0].tolist()))
        return plain(made, own, chosen)

    monkeypatch.setattr(cross_validation, "_images", noting)
    monkeypatch.setattr(folds_module, "_MOST_LINKED", 0)  # numbered embeddings look like bursts
    numbers = task.train.embeddings[:, 0].tolist()
    logits = out_of_fold_logits(task, fresh(tiny_backbone, task), strength, logits_of, every(task))
    labels, folds = task.labels, min(folds, per_class)  # no fold is tuned for nothing
    assert logits.shape == (len(numbers), len(TUNED)) and logits.isfinite().all()
    assert len(asked) == folds
    assert sorted(number for _, own in asked for number in own) == sorted(numbers)
    label = dict(zip(numbers, labels.tolist(), strict=True))
    for made, own in asked:
        # the images of a class are spread over the parts
        counts = [sum(label[number] == place for number in own) for place in range(len(TUNED))]
        assert max(counts) - min(counts) <= 1
        tuned_on = [(part, stage) for other, part, stage in noted if other is made]
        assert [stage.visual for _, stage in tuned_on] == ([False, True] if strength else [False])
        assert made.strength == strength
        for part, _ in tuned_on:
            kept = part.train.embeddings[:, 0].tolist()
            assert sorted([*kept, *own]) == sorted(numbers)
            assert part.tuned == TUNED
            # everything that belongs to an image follows it
            for rows in (
                part.views.embeddings[1, :, 0],
                part.views.tokens[1, :, 0, 0],
                part.alpha,
                part.bank.embeddings[:, 0],
            ):
                assert rows.tolist() == kept
            assert part.bank.confidences.shape[1:] == (len(TUNED),)
        if strength:
            assert float(made.visual.alpha) == pytest.approx(sum(kept) / len(kept))  # type: ignore
    assert len({id(made) for made, _ in asked}) == folds


def test_a_single_image_of_a_class_is_always_tuned_on(
    tiny_backbone: Backbone, noted: list[Any]
) -> None:
    _, task = make(tiny_backbone)
    task = without_val(task)
    one = some(task, 1)
    logits = out_of_fold_logits(one, fresh(tiny_backbone, task), 0.0, logits_of, every(one))
    assert logits.isnan().all()
    assert noted == []
    pair = one.train.labels[0]
    six = task.with_rows((task.train.labels == pair) | (torch.arange(len(task.train)) % 4 == 0))
    logits = out_of_fold_logits(six, fresh(tiny_backbone, task), 0.0, logits_of, every(six))
    held = six.train.labels == pair
    assert logits[held].isfinite().all() and logits[~held].isnan().all()
    for _, part, _ in noted:
        assert {*part.train.labels.tolist()} == {*TUNED}


def test_logits_are_those_of_the_models_of_the_parts_bias_included(
    tiny_backbone: Backbone, noted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task = make(tiny_backbone)
    task = without_val(task)
    monkeypatch.setattr(tiny_backbone, "logit_bias", -3.0)
    made: list[Learner] = []
    held: list[Tensor] = []
    plain = cross_validation._images

    def moved(tuned: tuple[int, ...]) -> Learner:
        made.append(learner(tiny_backbone, task.config, tuned))
        generator = torch.Generator().manual_seed(len(made))
        for parameter in made[-1].parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return made[-1]

    def noting(own: Learner, part: TuningTask, chosen: Tensor) -> Tensor:
        held.append(chosen)
        return plain(own, part, chosen)

    monkeypatch.setattr(cross_validation, "_images", noting)
    logits = out_of_fold_logits(task, moved, 1.0, logits_of, every(task))
    assert task.views is not None and task.views.tokens is not None
    assert len(made) == len(held) == 2
    for own, chosen in zip(made, held, strict=True):
        embeddings = own.embed_tokens(task.views.tokens[0][chosen])
        expected = task.scale * embeddings @ own.mean_texts(TUNED).T - 3.0
        torch.testing.assert_close(logits[chosen], expected, atol=1e-3, rtol=0)
    assert not torch.allclose(made[0].mean_texts(TUNED), made[1].mean_texts(TUNED), atol=1e-3)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_tuning_for_it_changes_neither_model_nor_task(
    strength: float, tiny_backbone: Backbone
) -> None:
    own, task = make(tiny_backbone)
    task = without_val(replace(task, config=config(tuning_epochs=2, tuning_learning_rate=0.05)))
    before = copy.deepcopy(own.state_dict())
    frozen = copy.deepcopy(tiny_backbone.model.state_dict())
    train_rows = task.train.embeddings.clone()
    found = out_of_fold_logits(task, fresh(tiny_backbone, task), strength, logits_of, every(task))
    again = out_of_fold_logits(task, fresh(tiny_backbone, task), strength, logits_of, every(task))
    assert torch.equal(found, again)
    rows = torch.tensor([1, 4, 6])
    some_found = out_of_fold_logits(task, fresh(tiny_backbone, task), strength, logits_of, rows)
    torch.testing.assert_close(some_found, found[rows], equal_nan=True)
    assert not found.requires_grad
    for kept, now in ((before, own.state_dict()), (frozen, tiny_backbone.model.state_dict())):
        assert all(torch.equal(kept[name], now[name]) for name in kept)
    assert torch.equal(train_rows, task.train.embeddings)
    untuned = task.scale * task.train.embeddings @ own.mean_texts(TUNED).T
    assert not torch.allclose(found, untuned, atol=0.05)  # they were tuned


@pytest.mark.parametrize("without", [("colours", "visual"), ("visual-prompts",)])
def test_a_run_without_validation_images_is_calibrated(
    without: tuple[str, ...], tiny_model_dir: Path, photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    shutil.rmtree(data / "val")
    few: dict[str, Any] = {"shots": 6, "tuning_epochs": 2, "visual_epochs": 1, "prompt_depth": 2}
    few |= {"map_side": "images", "map_ridge": 0.01, "rows_weight": 0.1}
    if "visual" not in without:
        few["visual_strength"] = "0.5"
    own = train_config(data=str(data), model=f"local-dir:{tiny_model_dir}", method="full", **few)
    train(replace(own, without=without), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == {"train": 24, "val": 0}
    assert result["calibration"]["kind"] == "temperature"
    assert result["calibration"]["temperature"] != 1.0
    assert result["zero_shot_temperature"] != 1.0
    # with a visual side, the model's own embeddings do not fit to the logits of the folds
    assert (load_run(tmp_path / "run").validation is None) == ("visual" not in without)


@pytest.mark.parametrize(
    ("strength", "setting"), [(0.0, "tuning.learning_rate"), (1.0, "visual.learning_rate")]
)
def test_parts_whose_tuning_diverges_give_nothing_and_name_the_setting(
    strength: float, setting: str, tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    _, task = make(tiny_backbone)
    task = without_val(replace(task, config=config(**{setting.replace(".", "_"): 1e30})))
    logits = out_of_fold_logits(task, fresh(tiny_backbone, task), strength, logits_of, every(task))
    assert logits.shape == (len(task.train), len(TUNED)) and logits.isnan().all()
    told = capsys.readouterr().err
    assert "note: confidences are not calibrated: cross-validation diverged (in epoch 1 " in told
    assert f"); lower {setting} and tune again" in told
    assert tempfile.gettempdir() not in told


def test_a_run_whose_cross_validation_diverges_ends_uncalibrated(
    configure: Callable[..., TrainConfig],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_far(*arguments: Any) -> Any:
        *others, stage, label = arguments
        return tune(*others, replace(stage, rate=1e30), label)

    monkeypatch.setattr(cross_validation, "tune", too_far)
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    few = {"visual_views": 2, "visual_strength": "1", "shots": 6}
    config = configure(data=str(tmp_path / "data"), method="coop", added=("adapter",), **few)
    report = train(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"]["val"] == 0
    assert result["calibrators"] == {}
    assert report["temperature"] == result["zero_shot_temperature"] == 1.0
    assert load_run(tmp_path / "run").fitted.temperature == 1.0
