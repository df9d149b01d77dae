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
        Views(rows, rows[-1], torch.stack([made.prefix(view).half() for view in views])),
        made.prefix(val).half(),
        torch.linspace(0.1, 0.5, len(labels)),
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
    choose_strength(made, without_val(task), trial, made.mean_texts(task.tuned))
    assert made.strength == expected
    assert (made.visual is None) == (expected == 0)
    assert worth_tuning(task, trial) == (expected > 0)


def test_without_a_trial_validation_images_decide_afterwards(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    assert worth_tuning(task, None)
    assert not worth_tuning(without_val(task), None)
    choose_strength(made, without_val(task), None, made.mean_texts(task.tuned))
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
    choose_strength(made, replace(task, val=val), trial, texts)
    assert made.strength == expected


def test_gains_are_those_of_each_image_at_its_own_temperature(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    assert made.visual is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in made.visual.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.set_strength(0.25)
    before = made.mean_texts(task.tuned)
    with torch.no_grad():
        made.prompts[0].context += 0.1  # type: ignore[operator]
    found = strength._gains(made, before, task.scale, strength._validation(task))
    assert found is not None
    assert made.strength == 0.25
    labels = task.val.labels_among(task.tuned)
    losses = []
    for value in GRID:
        made.set_strength(value or 1.0)
        assert task.val_tokens is not None
        images = made.embed_tokens(task.val_tokens) if value else task.val.embeddings
        texts = made.mean_texts(task.tuned) if value else before
        logits = task.scale * images @ texts.T
        scaled = (logits / fit_temperature(logits, labels)).double()
        losses.append(-scaled.log_softmax(1)[torch.arange(len(labels)), labels])
    for place, own in enumerate(losses):
        saved = (losses[0] - own).numpy()
        assert found.mean[place] == pytest.approx(saved.mean(), abs=1e-5)
        assert found.error[place] == pytest.approx(saved.std(ddof=1) / len(saved) ** 0.5, abs=1e-5)
    assert found.mean[0] == found.error[0] == 0
    assert len({*found.mean}) == len(GRID)


@pytest.mark.parametrize("classes", [2, 3])
def test_fewer_than_four_classes_are_not_tried_out(classes: int, tiny_backbone: Backbone) -> None:
    _, task = make(tiny_backbone, tuple(range(classes)))

    def never(_: tuple[int, ...]) -> Learner:
        raise AssertionError

    assert run_trial(task, never) is None


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a trial was tuned on and asked about, without any tuning."""
    found: dict[str, Any] = {"tasks": [], "questions": []}

    def noting(
        made: Learner, task: TuningTask, folder: Path, stage: Stage, label: str = ""
    ) -> tuple[TuningState, ConfusionBank | None]:
        found["tasks"].append(task)
        return TuningState(), task.bank

    def asked(made: Learner, before: Tensor, scale: float, question: Any) -> Gains:
        found["questions"].append(question)
        found["learner"] = made
        return FLAT

    monkeypatch.setattr(strength, "tune", noting)
    monkeypatch.setattr(strength, "_gains", asked)
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


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_trial_never_sees_the_held_out_classes(
    validated: bool, seed: int, tiny_backbone: Backbone, tried: dict[str, Any]
) -> None:
    _, task = make(tiny_backbone)
    task = numbered(replace(task, config=config(seed=seed, tuning_epochs=5, visual_epochs=3)))
    label = labels_of(task)
    task = task if validated else without_val(task)
    made = learner(tiny_backbone, task.config, task.tuned)
    assert run_trial(task, lambda _: made) == Trial(FLAT, FLAT)
    seen, unseen = tried["questions"]
    assert len(seen.classes) == 2
    assert {*seen.classes} | {*unseen.classes} == {*task.tuned}
    assert not {*seen.classes} & {*unseen.classes}
    for question in (seen, unseen):
        assert question.frozen[:, 0].tolist() == question.tokens[:, 0, 0].tolist()
    numbers = {"seen": seen.tokens[:, 0, 0].tolist(), "unseen": unseen.tokens[:, 0, 0].tolist()}
    for question, own in ((seen, numbers["seen"]), (unseen, numbers["unseen"])):
        assert [question.classes[at] for at in question.labels.tolist()] == [label[n] for n in own]
    for half in tried["tasks"]:
        assert half.tuned == seen.classes
        rows = half.train.embeddings[:, 0].tolist()
        assert rows
        assert {label[n] for n in rows} == {*seen.classes}
        assert half.train.labels.tolist() == [label[n] for n in rows]
        for other in (half.views.embeddings[1, :, 0], half.views.tokens[1, :, 0, 0], half.alpha):
            assert other.tolist() == rows
        assert half.bank.embeddings[:, 0].tolist() == rows
        assert half.bank.counts.shape == (2, 2)
        assert {label[n] for n in half.val.embeddings[:, 0].tolist()} <= {*seen.classes}
        assert not {*rows} & {*numbers["seen"], *numbers["unseen"]}  # nothing it was tuned on
        assert (half.config.tuning.epochs, half.config.visual.epochs) == (3, 2)
        expected = [task.reference[task.tuned.index(c)] for c in seen.classes]
        assert torch.equal(half.reference, torch.stack(expected))
        assert float(made.visual.alpha) == pytest.approx(sum(rows) / len(rows))  # type: ignore
    everything = [n for n in label if label[n] in unseen.classes and (validated or n < 101)]
    assert sorted(numbers["unseen"]) == everything
    if validated:
        assert sorted(numbers["seen"]) == [n for n in label if label[n] in seen.classes and n > 100]
    else:  # every second training image instead
        own = [n for n in label if label[n] in seen.classes and n < 101]
        assert sorted([*numbers["seen"], *rows]) == own
        assert len(numbers["seen"]) == len(own) // 2


@pytest.mark.parametrize("val_classes", [0, 1, 2, 9])
def test_a_trial_ends_in_numbers_whichever_classes_have_validation_images(
    val_classes: int, tiny_backbone: Backbone
) -> None:
    _, task = make(tiny_backbone, (0, 1, 2, 3), val_classes=val_classes or 1)
    task = task if val_classes else without_val(task)
    trials = []
    for seed in (1, 2):
        own = replace(task, config=config(seed=seed, tuning_epochs=2, tuning_learning_rate=0.01))
        trial = run_trial(own, lambda tuned: learner(tiny_backbone, task.config, tuned))
        assert trial is not None
        trials.append(trial)
        for found in (trial.seen, trial.unseen):
            if found is None:  # there are too few images to ask about
                assert 0 < val_classes < 4
                continue
            assert len(found.mean) == len(found.error) == len(GRID)
            assert all(-100 < gain < 100 for gain in found.mean)
            assert all(0 <= error < 100 for error in found.error)
        assert trial.unseen is not None
    assert trials[0] != trials[1]


def test_a_trial_is_the_same_again(tiny_backbone: Backbone) -> None:
    _, task = make(tiny_backbone)
    trials = [run_trial(task, lambda own: learner(tiny_backbone, task.config, own)) for _ in "ab"]
    assert trials[0] == trials[1]


@pytest.mark.parametrize("setting", ["tuning.learning_rate", "visual.learning_rate"])
def test_a_trial_that_diverges_promises_nothing_and_names_the_setting(
    setting: str, tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    _, task = make(tiny_backbone)
    own = replace(task, config=config(**{setting.replace(".", "_"): 1e30}))
    trial = run_trial(own, lambda tuned: learner(tiny_backbone, own.config, tuned))
    told = capsys.readouterr().err
    assert re.search(
        rf"^note: the visual side stays as it was, .* \(in epoch 1 .*\); lower {setting} ",
        told,
        re.M,
    )
    assert tempfile.gettempdir() not in told
    assert trial is not None
    assert not worth_tuning(own, Trial.from_dict(json.loads(json.dumps(asdict(trial)))))


def test_one_image_is_too_few_to_be_sure(tiny_backbone: Backbone) -> None:
    made, task = make(tiny_backbone)
    whole = strength._validation(task)
    one = replace(whole, frozen=whole.frozen[:1], tokens=whole.tokens[:1], labels=whole.labels[:1])
    before = made.mean_texts(task.tuned)
    assert strength._gains(made, before, task.scale, one) is None
    assert strength._gains(made, before, task.scale, whole) is not None


def test_a_trial_comes_back_from_json_and_bad_forms_are_refused() -> None:
    trial = Trial(Gains((0.0, 0.1, 0.2, 0.3, 0.4), (0.0, 0.01, 0.02, 0.03, 0.04)), None)
    written = json.loads(json.dumps(asdict(trial)))
    assert Trial.from_dict(written) == trial
    for bad in ({}, {"seen": None}, {**written, "seen": {"mean": [0.0], "error": [0.0]}}, []):
        with pytest.raises((TypeError, KeyError, ValueError)):
            Trial.from_dict(bad)  # type: ignore[arg-type]
