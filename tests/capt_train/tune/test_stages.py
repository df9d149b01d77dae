"""Both sides tuned one after the other: what moves, what the bank sees, where it stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from capt_deploy.core.errors import RunError
from capt_train.calibrate.temperature import calibrated_nll
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank, mined_classes
from capt_train.data.features import Features
from capt_train.data.fewshot import FewShotSplit
from capt_train.method import loss_terms
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner, make_learner
from capt_train.method.loss_terms import Step
from capt_train.tune import epochs
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.stages import Stage, TuningTask, text_stage, visual_stage
from capt_train.tune.tune import BEST, LAST, tune
from capt_train.tune.views import Views
from tests.banks import count_matrix
from tests.configs import train_config

NAMES = ("cat", "dog", "boat", "tree", "car")
TUNED = (0, 1, 2, 4)
SHOTS, VIEWS = 3, 3  # the last view is never tuned on
PARTS = ("prompt", "semantic-experts", "adapter", "sample-experts", "visual-prompts")
TEXT = Stage("text-", True, False, 2, 0.01, 4)
VISUAL = Stage("", False, True, 3, 0.01, 4, consistency=1.0)


def config(*without: str, **settings: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "method": "full",
        "without": ("mixture", *without),
        "tuning_batch_size": 5,
        "visual_batch_size": 5,
    }
    usual |= {
        "tuning_warmup_epochs": 1,
        "tuning_patience": 0,
        "prompt_depth": 2,
        "visual_prompt_depth": 1,
    }
    return train_config(data="", model="", **{**usual, "prompt_count": 2, **settings})


def learner(backbone: Backbone, own: TrainConfig) -> Learner:
    zero_shot = backbone.class_embeddings(NAMES, own.prompt.templates)
    shape = (2, len(NAMES), own.experts.centres, 32)
    centres = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    split = FewShotSplit(NAMES, TUNED, (), (), {})
    return make_learner(backbone, own, split, zero_shot, normalize(centres, dim=-1))


def pixels(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)


def make(
    backbone: Backbone, own: TrainConfig | None = None, validated: bool = True
) -> tuple[Learner, TuningTask]:
    """Return a new learner and a task of noise, in which the zero-shot model is mostly wrong."""
    own = own or config()
    made = learner(backbone, own)
    shown = [pixels(SHOTS * len(TUNED), seed) for seed in range(VIEWS)]
    rows = torch.stack([backbone.image_embeddings(view) for view in shown])
    tokens = None
    if made.visual is not None:
        tokens = torch.stack([made.prefix(view).half() for view in shown])
    labels = torch.tensor(TUNED).repeat_interleave(SHOTS)
    train = Features(rows[0], labels)
    val = pixels(8, seed=9)
    val_features = Features(backbone.image_embeddings(val), torch.tensor(TUNED).repeat(2))
    reference = backbone.class_embeddings(NAMES, own.prompt.templates)[list(TUNED)]
    logits = backbone.scale * rows[0] @ reference.T
    task = TuningTask(
        backbone.scale,
        TUNED,
        train,
        val_features if validated else val_features.rows(torch.zeros(0, dtype=torch.long)),
        reference,
        own,
        ConfusionBank.fill(logits, train.labels_among(TUNED), rows[0]),
        Views(rows, tokens),
        made.prefix(val).half() if tokens is not None and validated else None,
        torch.linspace(0.1, 1, len(labels)),
        made.class_rows(TUNED),
    )
    return made, task


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed_sides(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    """Return which sides have changed: text, visual."""
    after = module.state_dict()
    found = {name for name in before if not torch.equal(before[name], after[name])}
    return {"visual" if name.startswith("tuner") else "text" for name in found}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Return a list that collects what every step has computed its losses from."""
    found: list[Step] = []

    def noting(step: Step, weights: Any) -> dict[str, Tensor]:
        found.append(step)
        return loss_terms.loss_terms(step, weights)

    monkeypatch.setattr(epochs, "loss_terms", noting)
    return found


def test_the_settings_of_each_side_are_those_of_its_stage(tiny_backbone: Backbone) -> None:
    settings = {
        "tuning_epochs": 7,
        "tuning_learning_rate": 0.3,
        "tuning_patience": 5,
        "visual_epochs": 2,
        "visual_learning_rate": 0.1,
        "visual_consistency": 7.0,
        "visual_patience": 4,
    }
    made, task = make(tiny_backbone, config(**settings))
    assert text_stage(task, made) == Stage("text-", True, False, 7, 0.3, 5, 5)
    assert visual_stage(task.config) == Stage("", False, True, 2, 0.1, 5, 4, 7.0)


@pytest.mark.parametrize(
    ("without", "name"),
    [(("visual",), ""), (("prompt", "semantic-experts"), None), ((), "text-")],
)
def test_a_text_side_that_is_not_there_has_no_stage(
    without: tuple[str, ...], name: str | None, tiny_backbone: Backbone
) -> None:
    made, task = make(tiny_backbone, config(*without))
    stage = text_stage(task, made)
    assert (None if stage is None else stage.name) == name


def test_a_visual_stage_reads_the_class_rows_of_the_task_and_runs_no_text_tower(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, task = make(tiny_backbone)
    generator = torch.Generator().manual_seed(0)
    rows = ClassRows(torch.randn(4, 32, generator=generator), torch.randn(4, generator=generator))

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(made, "texts", never)
    state, _ = tune(made, replace(task, class_rows=rows), tmp_path, VISUAL)
    for step in steps:
        assert step.images is not None
        expected = task.scale * step.images @ rows.rows.T + rows.biases
        torch.testing.assert_close(step.logits, expected[None])
    assert task.val_tokens is not None
    logits = task.scale * made.embed_tokens(task.val_tokens) @ rows.rows.T + rows.biases
    nll = calibrated_nll(logits, task.val.labels_among(TUNED))
    assert nll == pytest.approx(state.history[-1]["val_nll"], abs=1e-4)


@pytest.mark.parametrize(
    ("stage", "sides"),
    [(TEXT, {"text"}), (VISUAL, {"visual"})],
)
def test_a_stage_moves_what_it_should_and_nothing_else(
    stage: Stage, sides: set[str], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    frozen = state_of(tiny_backbone.model)
    made, task = make(tiny_backbone)
    before = state_of(made)
    tune(made, task, tmp_path, stage)
    assert changed_sides(before, made) == sides
    centres = "transforms.semantic-experts.centres"
    assert torch.equal(made.state_dict()[centres], before[centres])
    assert all(torch.equal(frozen[n], v) for n, v in tiny_backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_backbone.model.parameters())


def test_a_visual_stage_that_only_harms_leaves_the_parameters_as_they_were(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(tiny_backbone)
    before = state_of(made)
    assert task.val_tokens is not None
    taken = (made.embed_tokens(task.val_tokens) @ made.mean_texts(TUNED).T).argmax(dim=1)
    right = Features(task.val.embeddings, torch.tensor(TUNED)[taken])  # so nothing is to be gained
    sure = replace(task, scale=100 * task.scale, val=right)
    state, _ = tune(made, sure, tmp_path, replace(VISUAL, rate=0.1, patience=3))
    assert state.epoch == 3
    assert state.best_nll is not None
    assert min(entry["val_nll"] for entry in state.history) > state.best_nll
    assert state.best_epoch == 0
    assert changed_sides(before, made) == set()


@contextmanager
def killed_in_step(number: int) -> Iterator[None]:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def whole_run(made: Learner, task: TuningTask, folder: Path) -> list[TuningState]:
    found = []
    for stage in (TEXT, VISUAL):
        state, bank = tune(made, task, folder, stage)
        task = replace(task, bank=bank)
        found.append(state)
    return found


@pytest.mark.parametrize("step", [5, 8, 14])  # three steps an epoch, two epochs and three
def test_a_run_cut_in_either_stage_ends_with_the_bits_of_an_uninterrupted_one(
    step: int, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    own = config()
    whole, task = make(tiny_backbone, own)
    expected = whole_run(whole, task, tmp_path / "whole")
    with killed_in_step(step):
        whole_run(learner(tiny_backbone, own), task, tmp_path / "cut")
    resumed = learner(tiny_backbone, own)
    assert whole_run(resumed, task, tmp_path / "cut") == expected
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    both = {f"{start}{name}" for start in ("", "text-") for name in (BEST, LAST)}
    assert {*files(tmp_path / "whole")} == both
    after = resumed.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state_of(whole).items())


@pytest.mark.parametrize("stage", [TEXT, VISUAL])
def test_the_bank_learns_from_the_held_view_alone(
    stage: Stage, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(tiny_backbone, config(confusion_momentum=0.6))
    assert task.bank is not None
    assert task.views is not None
    assert task.views.tokens is not None
    _, bank = tune(made, task, tmp_path, replace(stage, epochs=1))
    with torch.no_grad():
        texts = made.texts(TUNED).embeddings.mean(dim=0)
        images = task.views.embeddings[-1]
        if stage.visual:
            images = made.embed_tokens(task.views.tokens[-1])
        new = (task.scale * images @ texts.T).softmax(dim=1)
    counts = torch.zeros(4, 4)
    for label, taken in zip(task.bank.labels.tolist(), new.argmax(dim=1).tolist(), strict=True):
        counts[label, taken] += label != taken
    assert bank is not None
    before = count_matrix(task.bank)
    torch.testing.assert_close(count_matrix(bank), 0.6 * before + 0.4 * counts)
    torch.testing.assert_close(bank.confidences, 0.6 * task.bank.confidences + 0.4 * new)
    assert not torch.equal(count_matrix(bank), before)


def test_with_one_view_there_is_nothing_to_write_back(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(tiny_backbone)
    assert task.views is not None
    assert task.views.tokens is not None
    only = task.views.embeddings[:1]
    single = Views(only, task.views.tokens[:1])
    _, bank = tune(made, replace(task, views=single), tmp_path, replace(VISUAL, epochs=1))
    assert bank is task.bank


def test_the_held_view_is_never_tuned_on_the_others_are(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step]
) -> None:
    made, task = make(tiny_backbone)
    assert task.views is not None
    assert task.views.tokens is not None
    for held in (task.views.embeddings[-1], task.views.tokens[-1]):
        held.fill_(float("nan"))  # would stop the tuning
    tune(made, replace(task, bank=None), tmp_path, replace(VISUAL, epochs=6))
    shown = torch.cat([step.frozen for step in steps if step.frozen is not None])
    for view in task.views.embeddings[:-1]:
        assert (shown[:, None] == view).all(dim=2).any()


def rows_of(images: Tensor, task: TuningTask) -> Tensor:
    return (images[:, None] == task.train.embeddings).all(dim=2).int().argmax(dim=1)


def test_retrieved_samples_join_the_contrast_alone_with_their_own_labels(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step]
) -> None:
    made, task = make(tiny_backbone)
    assert task.bank is not None
    wrong = task.bank.labels != task.bank.predicted
    assert wrong.sum() > 0
    tune(made, task, tmp_path, replace(TEXT, epochs=1))
    mined = mined_classes(task.bank, task.config.confusion.pairs)
    seen = []
    for step in steps:
        assert step.images is not None
        assert step.mined is not None
        rows = rows_of(step.images, task)
        assert torch.equal(step.labels, task.bank.labels[rows])
        assert torch.equal(step.mined, mined[rows])
        assert len(rows) == step.logits.shape[1] == 4  # 12 images in three batches
        seen += rows.tolist()
        assert step.retrieved is not None
        assert step.texts is not None
        for z, label, classes in zip(
            step.retrieved.logits[0], step.retrieved.labels, step.retrieved.mined, strict=True
        ):
            images = task.train.embeddings[wrong]
            expected = task.scale * images @ step.texts[0].T
            nearest = (expected - z).abs().amax(dim=1).argmin()
            torch.testing.assert_close(expected[nearest], z)
            assert task.bank.labels[wrong][nearest] == label
            assert torch.equal(mined[wrong][nearest], classes)
    assert sorted(seen) == list(range(12))


def test_each_image_is_contrasted_with_the_classes_mined_for_it(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step]
) -> None:
    made, task = make(tiny_backbone, config(confusion_pairs=1))
    assert task.bank is not None
    mined = mined_classes(task.bank, 1)
    assert len({tuple(own) for own in mined.tolist()}) > 1
    tune(made, task, tmp_path, replace(TEXT, epochs=1))
    assert len(steps) == 3
    for step in steps:
        assert step.images is not None
        assert step.mined is not None
        rows = rows_of(step.images, task)
        assert torch.equal(step.mined, mined[rows])


def test_without_retrieval_every_image_comes_once(
    tiny_backbone: Backbone, tmp_path: Path, steps: list[Step]
) -> None:
    made, task = make(tiny_backbone, config("retrieval"))
    tune(made, task, tmp_path, replace(TEXT, epochs=1))
    assert [len(step.labels) for step in steps] == [4, 4, 4]
    assert all(step.mined is not None for step in steps)


def test_images_adapt_by_their_own_strength_and_validation_by_the_mean(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, task = make(tiny_backbone, config("retrieval"))
    given: list[Tensor | None] = []
    images = made.images

    def noting(tokens: Tensor, alpha: Tensor | None = None, **options: Any) -> Any:
        given.append(alpha)
        return images(tokens, alpha, **options)

    monkeypatch.setattr(made, "images", noting)
    tune(made, task, tmp_path, replace(VISUAL, epochs=1))
    own = torch.cat([alpha for alpha in given if alpha is not None])
    assert task.alpha is not None
    assert torch.equal(own.sort().values, task.alpha)
    assert given[-1] is None


def test_validation_of_both_sides_reads_tuned_embeddings(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(tiny_backbone)
    nothing = replace(task.val, embeddings=torch.full_like(task.val.embeddings, float("nan")))
    state, _ = tune(made, replace(task, val=nothing), tmp_path, replace(VISUAL, epochs=1))
    assert state.best_nll is not None
    assert 0 < state.best_nll < 100


def test_the_routers_of_both_sides_are_balanced(tiny_backbone: Backbone, tmp_path: Path) -> None:
    own = config(
        tuning_batch_size=100,
        visual_batch_size=100,
        tuning_warmup_epochs=0,
        tuning_weight_decay=0.0,
    )
    made, task = make(tiny_backbone, own)
    assert made.visual is not None
    routers: Any = (
        made.transforms["semantic-experts"].router,
        made.visual.parts["sample-experts"].router,
    )
    for router in routers:
        router.bias.data = torch.linspace(1.0, -1.0, len(router.bias))
    # In the first step all experts still are without effect: no other term reaches a router.
    for stage in (TEXT, VISUAL):
        tune(made, task, tmp_path, replace(stage, epochs=1))
    for router in routers:
        assert router.bias[0] < 1
        assert router.bias[1] > float(torch.linspace(1.0, -1.0, len(router.bias))[1])


@contextmanager
def noted_gradients(own: Learner) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def note(*_: Any) -> None:
        parts = [p.grad.flatten() for p in own.parameters() if p.grad is not None]
        found.append(torch.cat(parts).clone())

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def test_the_whole_gradient_is_clipped_and_keeps_its_direction(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    first = {}
    for norm in (0.0, 0.01):
        made, task = make(tiny_backbone, config(tuning_clip_norm=norm))
        with noted_gradients(made) as gradients:
            tune(made, task, tmp_path / str(norm), replace(VISUAL, epochs=1))
        first[norm] = gradients[0]
        assert norm == 0 or all(g.norm() <= norm * 1.001 for g in gradients)
    raw, clipped = first[0.0], first[0.01]
    assert raw.norm() > 0.1
    torch.testing.assert_close(clipped, raw * 0.01 / raw.norm(), rtol=1e-3, atol=1e-7)


def broken(step: Step) -> Tensor:
    """A term that is 0 while its slope is not finite."""
    return (0 * step.logits.sum()).sqrt()


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_gradient_that_is_not_finite_is_named_and_the_last_checkpoint_stays(
    epoch: int, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, task = make(tiny_backbone)
    kept = {}
    if epoch == 2:
        with killed_in_step(5):
            tune(made, task, tmp_path, VISUAL)
        kept = files(tmp_path)
        assert LAST in kept
    monkeypatch.setattr(loss_terms, "margin", broken)
    where = rf"; the state before that epoch is in {LAST}" if epoch == 2 else "tune again$"
    message = rf"epoch {epoch} the gradient of the margin term became nan; lower visual.*{where}"
    with pytest.raises(RunError, match=message):
        tune(learner(tiny_backbone, task.config), task, tmp_path, VISUAL)
    assert (tmp_path / LAST).exists() == (epoch == 2)
    assert {name: files(tmp_path)[name] for name in kept} == kept


def test_a_gradient_too_large_in_the_sum_alone_is_named_as_that(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, task = make(tiny_backbone)
    for name in ("margin", "moments"):
        term = getattr(loss_terms, name)
        # Each has a finite gradient of its own; its norm is not.
        monkeypatch.setattr(loss_terms, name, lambda step, term=term: 1e30 * term(step))
    with pytest.raises(RunError, match="gradient of the weighted sum became nan; lower tuning"):
        tune(made, task, tmp_path, TEXT)


@pytest.mark.parametrize("term", ["consistency", "infonce"])
def test_a_term_that_is_not_finite_is_named(
    term: str, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, task = make(tiny_backbone)
    own = getattr(loss_terms, term)
    monkeypatch.setattr(loss_terms, term, lambda step: own(step) * float("inf"))
    with pytest.raises(RunError, match=f"epoch 1 the {term} term became inf; lower visual"):
        tune(made, task, tmp_path, VISUAL)


@pytest.mark.parametrize("validated", [True, False])
def test_a_last_step_that_breaks_only_the_visual_side_is_noticed(
    validated: bool, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(
        tiny_backbone, config(visual_batch_size=100, tuning_warmup_epochs=0), validated
    )
    stage = replace(VISUAL, rate=1e30, batch_size=100)
    with pytest.raises(RunError, match="in epoch 1 the image embeddings became nan; lower visual"):
        tune(made, task, tmp_path, stage)
    assert not (tmp_path / LAST).exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_lies_where_it_should_on_a_gpu(
    tiny_model_dir: Path, photos: Path, tmp_path: Path
) -> None:
    from capt_train.pipeline import train

    own = config(device="cuda", tuning_epochs=2, visual_epochs=2, shots=3, visual_views=3)
    own = replace(own, data=str(photos), model=f"local-dir:{tiny_model_dir}", without=())
    assert train(own, tmp_path / "run")["strength"] in (0, 0.25, 0.5, 0.75, 1)


def test_a_bank_of_another_form_is_no_checkpoint_of_this_version(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    made, task = make(tiny_backbone, config())
    path = tmp_path / LAST
    epochs.Epochs(made, task, TEXT).save(path, TuningState(1))
    loop = epochs.Epochs(made, task, TEXT)
    assert loop.load(path).epoch == 1
    content = load_file(path)
    del content["extra.bank.cells"]
    state = json.dumps({**vars(TuningState(1)), "history": []})
    save_file(content, path, {"state": state})
    with pytest.raises(RunError, match="another version"):
        loop.load(path)
