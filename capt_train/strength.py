"""How much of the visual side's tuning to keep: κ of METHOD 5, by validation and a trial (ours).

Where the frozen visual side is right already, adapter and experts can only overfit, and no loss on
the training images says so. Images of classes that were not tuned on do.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_train.calibration import calibrated_nll
from capt_train.features import every_second
from capt_train.learner import Learner
from capt_train.stages import TuningTask, stages, zero_shot_bank
from capt_train.tuning import tune
from capt_train.views import Views

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # of κ
_FEWEST_CLASSES = 4  # that can be halved into two problems
Curve = tuple[float, ...]  # calibrated NLL at each κ of GRID


@dataclass(frozen=True)
class Trial:
    """What a short run on half of the classes says."""

    seen: Curve  # on images of its own classes that it was not tuned on
    unseen: Curve  # on images of the other classes


@dataclass(frozen=True)
class _Question:
    """Images that the tuning has not seen."""

    classes: tuple[int, ...]
    tokens: Float[Tensor, "samples tokens width"]
    labels: Int[Tensor, " samples"]  # positions in `classes`


def try_out(task: TuningTask, make: Callable[[tuple[int, ...]], Learner]) -> Trial | None:
    """Tune on half of the classes for half as long, and ask about images it has not seen.

    Without validation images, every second training image is left out and asked about instead.

    Args:
        task: what is to be tuned on, with views and tokens.
        make: returns a new learner that is to be tuned on some classes.

    Returns:
        The trial; None with fewer than four classes.
    """
    if len(task.tuned) < _FEWEST_CLASSES:
        return None
    half, seen, unseen = _halved(task)
    learner = make(half.tuned)
    if learner.visual is not None and half.alpha is not None:
        learner.visual.set_constants(alpha=float(half.alpha.mean()))
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(half, learner):
            tune(learner, half, Path(folder), stage, "trial:")
    return Trial(_curve(learner, task.scale, seen), _curve(learner, task.scale, unseen))


def choose_strength(learner: Learner, task: TuningTask, trial: Trial | None) -> float:
    """Set the tuned model's κ to the best mean over seen and unseen classes; return it.

    What it does to seen classes is asked of the tuned model itself where there are validation
    images; what it does to unseen ones only the trial knows. With neither, κ is 1.
    """
    assert learner.visual is not None
    seen = trial.seen if trial else (0.0,) * len(GRID)
    if len(task.val):
        seen = _curve(learner, task.scale, _validation(task))
    mean = _mean(seen, trial.unseen if trial else seen)
    # with nothing to go by, all are equal, and the last is 1
    value = max(zip(GRID, mean, strict=True), key=lambda at: (-at[1], at[0]))[0]
    learner.visual.set_constants(strength=value)
    return value


def _mean(one: Curve, other: Curve) -> list[float]:
    return [(a + b) / 2 for a, b in zip(one, other, strict=True)]


def _halved(task: TuningTask) -> tuple[TuningTask, _Question, _Question]:
    """Return the trial's task, unseen images of its classes, and images of the others."""
    config, count = task.config, len(task.tuned)
    draw = torch.Generator().manual_seed(config.seed)
    inside = torch.zeros(count, dtype=torch.bool)
    inside[torch.randperm(count, generator=draw)[: count // 2]] = True
    own, others = _among(task, inside), _among(task, ~inside)
    unseen = _training_images(others, torch.ones(len(others.train), dtype=torch.bool))
    if len(own.val):
        seen = _validation(own)
        extra = _validation(others)
        unseen = replace(
            unseen,
            tokens=torch.cat([unseen.tokens, extra.tokens]),
            labels=torch.cat([unseen.labels, extra.labels]),
        )
    else:
        odd = every_second(own.train.labels)
        seen = _training_images(own, odd)
        own = _with_rows(own, ~odd)
    names = ("epochs", "visual_epochs", "far_epochs")
    shorter = replace(config, **{name: -(-getattr(config, name) // 2) for name in names})
    return _refilled(replace(own, config=shorter)), seen, unseen


def _among(task: TuningTask, inside: Bool[Tensor, " classes"]) -> TuningTask:
    """Return the task with some of its classes; its bank is left as it is."""
    classes = tuple(c for c, chosen in zip(task.tuned, inside.tolist(), strict=True) if chosen)
    wanted = torch.tensor(classes)
    val = torch.isin(task.val.labels, wanted)
    return replace(
        _with_rows(task, torch.isin(task.train.labels, wanted)),
        tuned=classes,
        val=task.val.rows(val.nonzero().squeeze(1)),
        val_tokens=None if task.val_tokens is None else task.val_tokens[val],
        reference=task.reference[inside.nonzero().squeeze(1).to(task.reference.device)],
    )


def _with_rows(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> TuningTask:
    """Return the task with some of its training images; its bank is left as it is."""
    views = task.views
    if views is not None:
        tokens = None if views.tokens is None else views.tokens[:, chosen]
        views = Views(views.embeddings[:, chosen], views.untouched[chosen], tokens)
    rows = chosen.nonzero().squeeze(1)
    alpha = None if task.alpha is None else task.alpha[chosen]
    return replace(task, train=task.train.rows(rows), views=views, alpha=alpha)


def _refilled(task: TuningTask) -> TuningTask:
    """Return the task with a bank of its own classes and images."""
    if task.bank is None:
        return task
    bank = zero_shot_bank(task.scale, task.train, task.tuned, task.reference)
    return replace(task, bank=bank)


def _validation(task: TuningTask) -> _Question:
    assert task.val_tokens is not None
    return _Question(task.tuned, task.val_tokens, task.val.labels_among(task.tuned))


def _training_images(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> _Question:
    assert task.views is not None and task.views.tokens is not None
    labels = task.train.labels_among(task.tuned)
    return _Question(task.tuned, task.views.tokens[0][chosen], labels[chosen])


@torch.no_grad()
def _curve(learner: Learner, scale: float, question: _Question) -> Curve:
    """Return the calibrated NLL at each κ; the learner's own κ is put back afterwards."""
    assert learner.visual is not None
    if not len(question.labels):  # nothing to ask about says nothing about any κ
        return (0.0,) * len(GRID)
    texts = learner.texts(question.classes).embeddings.mean(dim=0)
    labels = question.labels.to(texts.device)
    assert learner.visual.strength is not None
    before = float(learner.visual.strength)
    found = []
    for strength in GRID:
        learner.visual.set_constants(strength=strength)
        logits = scale * learner.embed_tokens(question.tokens) @ texts.T
        found.append(calibrated_nll(logits, labels))
    learner.visual.set_constants(strength=before)
    return tuple(found)
