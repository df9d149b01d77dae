from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from capt_deploy.core.errors import RunError
from capt_train.clip.backbone import Backbone
from capt_train.data.features import Features
from capt_train.method.learner import Learner
from capt_train.method.loss_terms import Step, loss_terms
from capt_train.method.prompt import PromptLearner
from capt_train.setting_groups import PromptSettings
from capt_train.tune import epochs
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.stages import TuningTask, text_stage
from capt_train.tune.tune import BEST, LAST, DivergenceError, tune
from tests.configs import changed, train_config

NAMES = ("cat", "dog", "boat", "tree", "car")
TUNED = (1, 2, 4)  # labels of the data set, not positions among the tuned ones


def images(backbone: Backbone, per_class: int, seed: int) -> Features:
    """Unit vectors around directions that the prompt has to find."""
    generator = torch.Generator().manual_seed(seed)
    centres = backbone.text_embeddings([f"a drawing of one {NAMES[label]}" for label in TUNED])
    rows = centres.repeat(per_class, 1)
    noise = 0.05 * torch.randn(rows.shape, generator=generator)
    return Features(normalize(rows + noise, dim=1), torch.tensor(TUNED).repeat(per_class))


def task(backbone: Backbone, **settings: Any) -> TuningTask:
    usual = {
        "method": "prompt",
        "tuning_epochs": 6,
        "tuning_warmup_epochs": 1,
        "tuning_batch_size": 4,
        "tuning_patience": 0,
    }
    reference = backbone.class_embeddings(NAMES, ["a photo of a {}."])[list(TUNED)]
    config = train_config(data="", model="", **{**usual, **settings})
    train, val = images(backbone, 5, seed=0), images(backbone, 3, seed=1)
    return TuningTask(backbone.scale, TUNED, train, val, reference, config)


def learner(backbone: Backbone) -> Learner:
    zero_shot = backbone.class_embeddings(NAMES, ["a photo of a {}."])
    return Learner(
        backbone, zero_shot, [PromptLearner(backbone, NAMES, TUNED, PromptSettings(depth=1))], {}
    )


def context(own: Learner) -> Tensor:
    """Return all that `learner` trains."""
    [parameter] = own.parameters()
    return parameter.detach()


def run(own: Learner, task: TuningTask, folder: Path) -> TuningState:
    """Tune in the one stage that there is without a visual side."""
    stage = text_stage(task, own)
    assert stage is not None
    state, bank = tune(own, task, folder, stage)
    assert bank is task.bank
    return state


def empty() -> Features:
    return Features(torch.zeros(0, 32), torch.zeros(0, dtype=torch.long))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@contextmanager
def killed_at_call(own: Learner, call: int) -> Iterator[None]:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    handle = own.prompts[0].register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        yield
    handle.remove()


def test_the_loss_falls_and_validation_gets_better(tiny_backbone: Backbone, tmp_path: Path) -> None:
    own = task(tiny_backbone, tuning_epochs=15, tuning_learning_rate=0.01, method="coop")
    state = run(learner(tiny_backbone), own, tmp_path)
    first, last = state.history[0], state.history[-1]
    assert state.epoch == state.best_epoch == len(state.history) == 15
    assert last["cross_entropy"] < 0.7 * first["cross_entropy"]
    assert last["val_nll"] < 0.7 * first["val_nll"]


def test_validation_is_judged_at_the_temperature_that_would_be_fitted(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    own = task(tiny_backbone)
    prompt = learner(tiny_backbone)
    state = run(prompt, own, tmp_path)
    with torch.no_grad():
        logits = own.scale * own.val.embeddings @ prompt.texts(own.tuned).embeddings[0].T
    labels = [own.tuned.index(label) for label in own.val.labels.tolist()]

    def nll(t: float) -> float:
        rows = zip(logits, labels, strict=True)
        return -sum(float((row / t).log_softmax(0)[own]) for row, own in rows)

    grid = torch.logspace(-1.3, 1.3, 2400).tolist()
    fitted = min(grid, key=lambda t: nll(t) + math.log(t) ** 2 / (2 * 0.5**2))
    assert state.best_nll == pytest.approx(nll(fitted) / len(labels), rel=2e-3)
    for other in (1.0, min(grid, key=nll)):  # neither raw nor without the prior
        assert state.best_nll != pytest.approx(nll(other) / len(labels), rel=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("call", [1, 8, 16, 23])  # five calls an epoch: four batches + val
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny_backbone: Backbone, tmp_path: Path, optimizer: str, call: int
) -> None:
    own = task(tiny_backbone, tuning_optimizer=optimizer)
    whole = learner(tiny_backbone)
    expected = run(whole, own, tmp_path / "whole")
    cut = learner(tiny_backbone)
    with killed_at_call(cut, call):
        run(cut, own, tmp_path / "cut")
    resumed = learner(tiny_backbone)
    assert run(resumed, own, tmp_path / "cut") == expected
    assert torch.equal(context(resumed), context(whole))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_tuning_a_finished_run_again_changes_nothing(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    own = task(tiny_backbone)
    state = run(learner(tiny_backbone), own, tmp_path)
    before = files(tmp_path)
    assert run(learner(tiny_backbone), own, tmp_path) == state
    assert files(tmp_path) == before


def test_the_seed_decides_the_order_of_the_images(tiny_backbone: Backbone, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((1, 1, 2)):
        prompt = learner(tiny_backbone)
        run(prompt, task(tiny_backbone, seed=seed), tmp_path / str(number))
        results.append(context(prompt))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@contextmanager
def noted_rates() -> Iterator[list[float]]:
    """Collect the learning rate of every step."""
    rates: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield rates
    finally:
        handle.remove()


def test_every_epoch_sees_each_image_once_in_an_order_of_its_own_at_the_scheduled_rate(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = task(tiny_backbone, tuning_learning_rate=0.01)
    batches: list[list[int]] = []

    def recorded(step: Step, weights: Any) -> Any:
        batches.append(step.labels.tolist())
        return loss_terms(step, weights)

    monkeypatch.setattr(epochs, "loss_terms", recorded)
    with noted_rates() as rates:
        run(learner(tiny_backbone), own, tmp_path)
    assert {len(batch) for batch in batches} == {3, 4}  # 15 images in four batches
    orders = [list(chain(*batches[start : start + 4])) for start in range(0, 24, 4)]
    assert all(sorted(epoch) == [0] * 5 + [1] * 5 + [2] * 5 for epoch in orders)
    assert len({tuple(epoch) for epoch in orders}) == 6
    warm_up = [0.0025, 0.005, 0.0075, 0.01]
    cosine = [0.005 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates == pytest.approx(warm_up + cosine)


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 1), (1, 9), (2, 2), (3, 9)])
def test_a_warm_up_that_is_too_long_leaves_one_epoch_of_cosine(
    tiny_backbone: Backbone, tmp_path: Path, epochs: int, warmup_epochs: int
) -> None:
    settings = {
        "tuning_epochs": epochs,
        "tuning_warmup_epochs": warmup_epochs,
        "tuning_learning_rate": 0.01,
    }
    with noted_rates() as rates:
        state = run(learner(tiny_backbone), task(tiny_backbone, **settings), tmp_path)
    assert state.epoch == epochs
    rising = 4 * (epochs - 1)
    warm_up = [0.01 * (step + 1) / rising for step in range(rising)]
    cosine = [0.005 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx(warm_up + cosine)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_decay_as_fast_as_asked_for(
    tiny_backbone: Backbone, tmp_path: Path, optimizer: str
) -> None:
    start = context(learner(tiny_backbone)).clone()
    after = {}
    for decay in (0.0, 0.5):
        settings = {
            "tuning_epochs": 1,
            "tuning_batch_size": 100,
            "tuning_learning_rate": 0.1,
            "tuning_weight_decay": decay,
        }
        prompt = learner(tiny_backbone)
        own = task(tiny_backbone, tuning_optimizer=optimizer, **settings)
        run(prompt, own, tmp_path / str(decay))
        after[decay] = context(prompt)
    # One step from one place: all but the decay is the same.
    torch.testing.assert_close(after[0.5], after[0.0] - 0.1 * 0.5 * start)


def test_it_stops_early_and_keeps_the_best_epoch(tiny_backbone: Backbone, tmp_path: Path) -> None:
    own = task(tiny_backbone, tuning_epochs=40, tuning_patience=2, tuning_learning_rate=0.05)
    wrong = Features(own.val.embeddings, own.val.labels.roll(1))  # gets worse with every epoch
    prompt = learner(tiny_backbone)
    state = run(prompt, replace(own, val=wrong), tmp_path)
    assert state.epoch == state.best_epoch + 2 < 40
    assert state.best_nll == min(entry["val_nll"] for entry in state.history)
    assert state.best_nll == state.history[state.best_epoch - 1]["val_nll"]
    short = replace(own, val=wrong, config=changed(own.config, tuning_patience=40))
    with killed_at_call(other := learner(tiny_backbone), state.best_epoch * 5 + 1):
        run(other, short, tmp_path / "to the best epoch only")
    best = (tmp_path / BEST).read_bytes()
    assert (tmp_path / "to the best epoch only" / BEST).read_bytes() == best
    assert torch.equal(context(prompt), context(other))
    assert best != (tmp_path / LAST).read_bytes()


def test_patience_0_trains_all_epochs_and_takes_the_last(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    own = task(tiny_backbone, tuning_patience=0, tuning_learning_rate=0.05)
    wrong = Features(own.val.embeddings, own.val.labels.roll(1))
    state = run(learner(tiny_backbone), replace(own, val=wrong), tmp_path)
    assert state.epoch == state.best_epoch == 6
    assert state.history[0]["val_nll"] < state.history[-1]["val_nll"]


def test_without_validation_images_all_epochs_are_trained(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    own = replace(task(tiny_backbone, tuning_patience=1), val=empty())
    state = run(learner(tiny_backbone), own, tmp_path)
    assert state.epoch == state.best_epoch == 6
    assert state.best_nll is None
    assert all("val_nll" not in entry for entry in state.history)


@pytest.mark.parametrize("validated", [True, False])
def test_a_step_that_goes_too_far_is_an_error_and_keeps_no_broken_checkpoint(
    tiny_backbone: Backbone, tmp_path: Path, validated: bool
) -> None:
    own = task(tiny_backbone, tuning_learning_rate=1e30, tuning_batch_size=100)
    own = own if validated else replace(own, val=empty())
    reason = "in epoch 1 the class embeddings became nan"
    with pytest.raises(DivergenceError, match=f"{reason}; lower tuning") as caught:
        run(learner(tiny_backbone), own, tmp_path)
    assert (caught.value.reason, caught.value.setting) == (reason, "tuning.learning_rate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("term", ["cross_entropy", "moments"])
def test_a_term_that_is_not_finite_is_named_and_the_last_checkpoint_stays(
    tiny_backbone: Backbone, tmp_path: Path, term: str
) -> None:
    own = task(tiny_backbone)
    with killed_at_call(prompt := learner(tiny_backbone), 14):
        run(prompt, own, tmp_path)
    before = files(tmp_path)
    broken = replace(own, reference=own.reference * float("inf"))
    if term == "cross_entropy":
        rows = own.train.embeddings.clone()
        rows[3] = float("nan")
        broken = replace(own, train=Features(rows, own.train.labels))
    with pytest.raises(RunError, match=rf"in epoch 3 the {term} term became .* is in {LAST}"):
        run(learner(tiny_backbone), broken, tmp_path)
    assert files(tmp_path) == before


def mislabelled(backbone: Backbone, **settings: Any) -> TuningTask:
    """A task whose frozen prompt knows the images, and a fifth of whose labels are wrong."""
    texts = backbone.class_embeddings(NAMES, ["a photo of a {}."])[list(TUNED)]
    own = task(backbone, **settings)
    labels = torch.arange(len(TUNED)).repeat(20)
    wrong = torch.arange(len(labels)) % 5 == 0
    shown = torch.where(wrong, (labels + 1 + torch.arange(len(labels)) // 5 % 2) % 3, labels)
    return replace(
        own,
        # far enough apart for the model to be sure of all
        scale=30 / float(1 - (texts @ texts.T).fill_diagonal_(-1).max()),
        train=Features(texts[labels], torch.tensor(TUNED)[shown]),
    )


def noise_in(steps: list[Step]) -> set[float]:
    return {step.label_noise for step in steps}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Return the list into which the steps of a tuning go."""
    seen: list[Step] = []

    def record(step: Step, weights: dict[str, float]) -> dict[str, Tensor]:
        seen.append(step)
        return loss_terms(step, weights)

    monkeypatch.setattr(epochs, "loss_terms", record)
    return seen


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_share_of_wrong_labels_of_the_task_is_minded(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step], share: float
) -> None:
    own = replace(mislabelled(tiny_backbone, tuning_epochs=1), label_noise=share)
    run(learner(tiny_backbone), own, tmp_path)
    assert noise_in(steps) == {share}


def test_right_labels_are_tuned_on_as_without_looking_for_wrong_ones(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step]
) -> None:
    run(learner(tiny_backbone), task(tiny_backbone, tuning_epochs=1), tmp_path)
    assert noise_in(steps) == {0.0}
