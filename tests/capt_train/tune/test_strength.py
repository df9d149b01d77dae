"""How much of the visual side's tuning is kept, and whom the trial never sees."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capt_train.calibrate.temperature import fit_temperature
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.data.features import Features
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner, make_learner
from capt_train.tune import strength
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.stages import Stage, TuningTask
from capt_train.tune.strength import (
    GRID,
    Gains,
    Trial,
    best_strength,
    choose_strength,
    run_trial,
    worth_tuning,
)
from capt_train.tune.views import Views
from tests.configs import train_config

NAMES = ("cat", "dog", "boat", "tree", "car", "bus", "sun")
SHOTS, VAL = 4, 3
FLAT = Gains((0.0,) * len(GRID), (0.0,) * len(GRID))


def config(**settings: Any) -> TrainConfig:
    parts = ("prompt", "infonce", "adapter", "sample-experts")
    usual = {
        "method": "coop",
        "added": parts,
        "tuning_epochs": 1,
        "visual_epochs": 1,
        "tuning_patience": 0,
    }
    return train_config(data="", model="", **{**usual, **settings})


def learner(backbone: Backbone, own: TrainConfig, tuned: tuple[int, ...]) -> Learner:
    zero_shot = backbone.class_embeddings(NAMES, own.prompt.templates)
    return make_learner(backbone, own, FewShotSplit(NAMES, tuned, (), (), {}), zero_shot)


def make(
    backbone: Backbone, tuned: tuple[int, ...] = (0, 1, 3, 4, 6), val_classes: int = 9
) -> tuple[Learner, TuningTask]:
    """Return a learner, and a task of noise whose images can be told apart."""
    own = config()
    made = learner(backbone, own, tuned)
    generator = torch.Generator().manual_seed(0)

    def shown(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)

    views = [shown(SHOTS * len(tuned)) for _ in range(2)]
    rows = torch.stack([backbone.image_embeddings(view) for view in views])
    labels = torch.tensor(tuned).repeat_interleave(SHOTS)
    val_labels = torch.tensor(tuned[:val_classes]).repeat(VAL)
    val = shown(len(val_labels))
    reference = backbone.class_embeddings(NAMES, own.prompt.templates)[list(tuned)]
    train = Features(rows[0], labels)
    task = TuningTask(
        backbone.scale,
        tuned,
        train,
        Features(backbone.image_embeddings(val), val_labels),
        reference,
        own,
        ConfusionBank.fill(
            backbone.scale * rows[0] @ reference.T, train.labels_among(tuned), rows[0]
        ),
        Views(rows, torch.stack([made.prefix(view).half() for view in views])),
        made.prefix(val).half(),
        torch.linspace(0.1, 0.5, len(labels)),
        made.class_rows(tuned),
    )
    return made, task


def without_val(task: TuningTask) -> TuningTask:
    none = torch.zeros(0, dtype=torch.long)
    return replace(task, val=task.val.rows(none), val_tokens=None)


def gains(*mean: float, error: float = 0.0) -> Gains:
    return Gains(tuple(map(float, mean)), (float(error),) * len(GRID))


def uneven(*mean: float) -> Gains:
    """Return gains whose last one is not twice its error; the others are."""
    return Gains(tuple(map(float, mean)), (0.0, 0.4, 0.9, 1.4, 2.1))


@pytest.mark.parametrize(
    ("seen", "unseen", "expected"),
    [
        (gains(0, -1, -2, -3, -4), gains(0, -1, -2, -3, -4), 0.0),  # it only harms
        (gains(0, 1, 2, 3, 4), gains(0, 1, 2, 3, 4), 1.0),  # it only helps
        (gains(0, 9, 9, 9, 9), gains(0, -1, -1, -1, -1), 0.0),  # new classes would pay for it
        (gains(0, -1, -1, -1, -1), gains(0, 9, 9, 9, 9), 0.0),  # the tuned ones would
        (gains(0, 3, 4, 2, 1), gains(0, 1, 2, 3, 4), 0.5),  # the smaller gain decides
        (uneven(0, 1, 2, 3, 4), gains(0, 1, 2, 3, 4), 0.75),  # the largest is not sure
        (gains(0, 1, 2, 3, 4), uneven(0, 1, 2, 3, 4), 0.75),
        (gains(0, 1e-4, 2e-4, 3e-4, 4e-4), gains(0, 1, 2, 3, 4), 0.0),  # what rounding does
        (gains(0, 1, 2, 3, 4), gains(0, 4, 2, 2, 2, error=1.1), 0.25),  # 2 is not
        (gains(0, 1, 2, 3, 4, error=2), gains(0, 1, 2, 3, 4), 0.0),
        (gains(0, 1, 3, 2, 1), None, 0.5),
        (None, gains(0, 1, 1, 2, 1), 0.75),
        (None, None, 0.0),  # nobody to ask
    ],
)
def test_a_strength_must_surely_help_seen_and_unseen_classes(
    seen: Gains | None, unseen: Gains | None, expected: float, tiny_backbone: Backbone
) -> None:
    assert best_strength(seen, unseen) == expected
    made, task = make(tiny_backbone)
    trial = Trial(seen, unseen)
    choose_strength(made, without_val(task), trial)
    assert made.strength == expected
    assert (made.visual is None) == (expected == 0)
    assert worth_tuning(task, trial) == (expected > 0)


def test_without_a_trial_validation_images_decide_afterwards(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    assert worth_tuning(task, None)
    assert not worth_tuning(without_val(task), None)
    choose_strength(made, without_val(task), None)
    assert made.strength == 0


@pytest.mark.parametrize(("harms", "expected"), [(True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("seen", [None, gains(0, 9, 0, 0, 0)])
def test_a_tuned_model_is_asked_on_validation_images(
    harms: bool, expected: float, seen: Gains | None, tiny_backbone: Backbone
) -> None:
    made, task = make(tiny_backbone)
    assert made.visual is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in made.visual.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        texts = made.texts(task.tuned).embeddings[0]
        assert task.val_tokens is not None
        tuned = made.embed_tokens(task.val_tokens)
        right = ((task.val.embeddings if harms else tuned) @ texts.T).argmax(dim=1)
    # Whoever says so is always right: the frozen side, or the tuned one.
    val = replace(task.val, labels=torch.tensor(task.tuned)[right])
    trial = None if seen is None else Trial(seen, gains(0, 1, 2, 3, 4))
    choose_strength(made, replace(task, val=val), trial)
    assert made.strength == expected


def test_gains_are_those_of_each_image_at_its_own_temperature(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    assert made.visual is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in made.visual.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.set_strength(0.25)
    generator.manual_seed(1)
    biases = torch.randn(5, generator=generator)
    task = replace(task, class_rows=ClassRows(1.5 * made.mean_texts(task.tuned), biases))
    found = strength._gains(made, strength._validation(task), task.scale)
    assert found is not None
    assert made.strength == 0.25
    labels = task.val.labels_among(task.tuned)
    losses = []
    for value in GRID:
        made.set_strength(value or 1.0)
        assert task.val_tokens is not None
        images = made.embed_tokens(task.val_tokens) if value else task.val.embeddings
        logits = task.scale * images @ (1.5 * made.mean_texts(task.tuned)).T + biases
        scaled = (logits / fit_temperature(logits, labels)).double()
        losses.append(-scaled.log_softmax(1)[torch.arange(len(labels)), labels])
    for place, own in enumerate(losses):
        saved = (losses[0] - own).numpy()
        assert found.mean[place] == pytest.approx(saved.mean(), abs=1e-5)
        assert found.error[place] == pytest.approx(saved.std(ddof=1) / len(saved) ** 0.5, abs=1e-5)
    assert found.mean[0] == found.error[0] == 0
    assert len({*found.mean}) == len(GRID)


def never(*_: Any) -> Any:
    raise AssertionError


def rows_of(task: TuningTask) -> ClassRows:
    assert task.class_rows is not None
    return task.class_rows


@pytest.mark.parametrize(("classes", "tuned"), [("base", 2), ("base", 3), ("all", 5)])
def test_there_is_no_trial_where_the_tuning_itself_shows_as_much(
    classes: str, tuned: int, tiny_backbone: Backbone
) -> None:
    _, task = make(tiny_backbone, tuple(range(tuned)))
    task = replace(task, config=config(classes=classes))
    assert run_trial(task, never, never) is None


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a trial was tuned on and asked about, without any tuning."""
    found: dict[str, Any] = {"tasks": [], "questions": []}

    def noting(
        made: Learner, task: TuningTask, folder: Path, stage: Stage, label: str = ""
    ) -> tuple[TuningState, ConfusionBank | None]:
        assert stage.visual
        found["tasks"].append(task)
        return TuningState(), task.bank

    def gains_of(made: Learner, question: Any, scale: float) -> Gains:
        found["questions"].append(question)
        return FLAT

    monkeypatch.setattr(strength, "tune", noting)
    monkeypatch.setattr(strength, "_gains", gains_of)
    return found


def numbered(task: TuningTask) -> TuningTask:
    """Write a number into all that belongs to an image: 1, 2, … in training, 101, … in val."""
    assert task.views is not None
    assert task.views.tokens is not None
    assert task.val_tokens is not None
    train, val = torch.arange(len(task.train)) + 1.0, torch.arange(len(task.val)) + 101.0
    task.train.embeddings[:, 0], task.val.embeddings[:, 0] = train, val
    task.views.embeddings[:, :, 0], task.views.tokens[:, :, 0, 0] = train, train.half()
    task.val_tokens[:, 0, 0] = val.half()
    return replace(task, alpha=train)


def labels_of(task: TuningTask) -> dict[int, int]:
    """Return the label behind every number."""
    both = ((1, task.train), (101, task.val))
    return {start + i: own for start, f in both for i, own in enumerate(f.labels.tolist())}


def class_numbers(task: TuningTask) -> ClassRows:
    """Return class rows that begin with the index of their class."""
    rows = rows_of(task)
    return replace(rows, biases=torch.tensor(task.tuned, dtype=torch.float))


@pytest.mark.parametrize(
    ("classes", "validated"), [("base", True), ("base", False), ("all", False)]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_trial_never_sees_what_is_held_out(
    classes: str, validated: bool, seed: int, tiny_backbone: Backbone, tried: dict[str, Any]
) -> None:
    _, task = make(tiny_backbone)
    task = numbered(replace(task, config=config(classes=classes, seed=seed)))
    task = replace(task, class_rows=class_numbers(task))
    label = labels_of(task)
    task = task if validated else without_val(task)
    made = learner(tiny_backbone, task.config, task.tuned)
    fitted_on: list[TuningTask] = []

    def fit_class_rows(part: TuningTask) -> ClassRows:
        fitted_on.append(part)
        return class_numbers(part)

    trial = run_trial(task, lambda _: made, fit_class_rows)
    (half,) = tried["tasks"]
    held: dict[str, list[float]] = {}
    names = ("unseen", "seen") if classes == "base" else ("seen",)
    for name, question in zip(names, tried["questions"], strict=True):
        indices = question.class_rows.biases.tolist()  # the rows are those of the classes
        assert question.frozen[:, 0].tolist() == question.tokens[:, 0, 0].tolist()
        held[name] = question.tokens[:, 0, 0].tolist()
        assert [indices[at] for at in question.labels.tolist()] == [label[n] for n in held[name]]
    shown = half.train.embeddings[:, 0].tolist()
    assert half.train.labels.tolist() == [label[n] for n in shown]
    assert {label[n] for n in shown} == {*half.tuned} == {label[n] for n in held["seen"]}
    assert half.class_rows.biases.tolist() == [*half.tuned]
    for rows in (half.views.embeddings[1, :, 0], half.views.tokens[1, :, 0, 0], half.alpha):
        assert rows.tolist() == shown
    assert half.bank.embeddings[:, 0].tolist() == shown
    assert half.bank.confidences.shape[1:] == (len(half.tuned),)
    expected = [task.reference[task.tuned.index(c)] for c in half.tuned]
    assert torch.equal(half.reference, torch.stack(expected))
    assert float(made.visual.alpha) == pytest.approx(sum(shown) / len(shown))  # type: ignore
    if classes == "base":
        assert trial == Trial(FLAT, FLAT)
        assert len(half.tuned) == 3
        assert {label[n] for n in held["unseen"]} == {*task.tuned} - {*half.tuned}
    else:
        assert trial == Trial(FLAT, None)
        assert half.tuned == task.tuned
    judges = sorted(number for numbers in held.values() for number in numbers)
    if validated:
        assert judges == [n for n in label if n > 100]
        assert fitted_on == []
        return
    (part,) = fitted_on  # class rows are fitted to the other shots of all classes
    rest = part.train.embeddings[:, 0].tolist()
    assert {*shown} <= {*rest}
    assert sorted([*judges, *rest]) == [n for n in label if n < 100]
    assert len(judges) == len(rest)


@pytest.mark.parametrize("val_classes", [0, 1, 2, 9])
@pytest.mark.parametrize("classes", ["base", "all"])
def test_a_trial_ends_in_numbers_whichever_classes_have_validation_images(
    classes: str, val_classes: int, tiny_backbone: Backbone
) -> None:
    _, task = make(tiny_backbone, (0, 1, 2, 3), val_classes=val_classes or 1)
    task = task if val_classes else without_val(task)
    own = replace(task, config=config(classes=classes, visual_learning_rate=0.01))
    trial = run_trial(own, lambda tuned: learner(tiny_backbone, own.config, tuned), rows_of)
    if trial is None:
        assert classes == "all" and val_classes
        return
    for found in (trial.seen, trial.unseen):
        if found is None:  # too few images are held out, or no classes
            assert 0 < val_classes < 4 or classes == "all"
            continue
        assert len(found.mean) == len(found.error) == len(GRID)
        assert all(-100 < gain < 100 for gain in found.mean)
        assert all(0 <= error < 100 for error in found.error)


def base_task(task: TuningTask, **settings: Any) -> TuningTask:
    return replace(task, config=config(classes="base", **settings))


def test_a_trial_is_the_same_again(tiny_backbone: Backbone) -> None:
    _, task = make(tiny_backbone)
    trials = [
        run_trial(
            base_task(task, seed=seed),
            lambda tuned: learner(tiny_backbone, task.config, tuned),
            rows_of,
        )
        for seed in (1, 1, 2)
    ]
    assert trials[0] == trials[1] != trials[2]


def test_a_trial_that_diverges_promises_nothing_and_names_the_setting(
    tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    _, task = make(tiny_backbone)
    own = base_task(task, visual_learning_rate=1e30)
    trial = run_trial(own, lambda tuned: learner(tiny_backbone, own.config, tuned), rows_of)
    message = capsys.readouterr().err
    assert re.search(
        r"^note: the visual side stays as it was, .* \(in epoch 1 .*\); lower visual\.",
        message,
        re.M,
    )
    assert tempfile.gettempdir() not in message
    assert trial is not None
    assert not worth_tuning(own, Trial.from_dict(json.loads(json.dumps(asdict(trial)))))


def test_one_image_is_too_few_to_be_sure(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    whole = strength._validation(task)
    one = replace(whole, frozen=whole.frozen[:1], tokens=whole.tokens[:1], labels=whole.labels[:1])
    assert strength._gains(made, one, task.scale) is None
    assert strength._gains(made, whole, task.scale) is not None


def test_a_trial_comes_back_from_json_and_bad_forms_are_refused() -> None:
    trial = Trial(Gains((0.0, 0.1, 0.2, 0.3, 0.4), (0.0, 0.01, 0.02, 0.03, 0.04)), None)
    written = json.loads(json.dumps(asdict(trial)))
    assert Trial.from_dict(written) == trial
    for bad in ({}, {"seen": None}, {**written, "seen": {"mean": [0.0], "error": [0.0]}}, []):
        with pytest.raises((TypeError, KeyError, ValueError)):
            Trial.from_dict(bad)  # type: ignore[arg-type]
