"""How much of the visual side's tuning to keep: κ of METHOD 5, by validation and a trial (ours).

Where the frozen visual side is right already, adapter and experts can only overfit, and no loss on
the training images says so. Images of classes that were not tuned on do.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_deploy.core.console import say
from capt_train.calibrate.temperature import calibrated_losses
from capt_train.data.features import every_second
from capt_train.method.learner import Learner
from capt_train.tune.stages import TuningTask, refilled, stages, with_rows
from capt_train.tune.tune import DivergenceError, tune

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # of κ
_STANDARD_ERRORS = 2.0  # by which a gain must be above 0
_LEAST_GAIN = 1e-3  # nats; what rounding may look like
_FEWEST_CLASSES = 4  # that can be halved into two problems


@dataclass(frozen=True)
class Gains:
    """By how much each κ of GRID lowers the calibrated NLL of images that were not tuned on.

    Against the model before its visual side was tuned, whose prompt had the frozen one beside it.
    """

    mean: tuple[float, ...]
    error: tuple[float, ...]  # standard error of that mean


@dataclass(frozen=True)
class Trial:
    """What a short run on half of the classes says; None where too few images can be asked.

    Without any answer, as after a tuning that diverged, it promises nothing.
    """

    seen: Gains | None  # on images of its own classes that it was not tuned on
    unseen: Gains | None  # on images of the other classes

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trial":
        """Read the JSON form, that of `asdict`.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        asked = []
        for name in ("seen", "unseen"):
            own = values[name]
            mean, error = ((), ()) if own is None else (own["mean"], own["error"])
            if own is not None and not len(mean) == len(error) == len(GRID):
                raise ValueError(f"{name}: expected {len(GRID)} gains")
            gains = Gains(tuple(map(float, mean)), tuple(map(float, error)))
            asked.append(None if own is None else gains)
        return cls(*asked)


@dataclass(frozen=True)
class _Question:
    """Images that the tuning has not seen."""

    classes: tuple[int, ...]
    frozen: Float[Tensor, "samples dim"]  # f⁰
    tokens: Float[Tensor, "samples tokens width"]
    labels: Int[Tensor, " samples"]  # positions in `classes`


def try_out(task: TuningTask, make: Callable[[tuple[int, ...]], Learner]) -> Trial | None:
    """Tune on half of the classes for half as long, and ask about images it has not seen.

    Without validation images, every second training image is left out and asked about instead.

    Args:
        task: what is to be tuned on, with views and tokens.
        make: returns a new learner that is to be tuned on some classes.

    Returns:
        The trial, without answers where its tuning diverged; None with fewer than four classes.
    """
    if len(task.tuned) < _FEWEST_CLASSES:
        return None
    half, seen, unseen = _halved(task)
    learner = make(half.tuned)
    if learner.visual is not None and half.alpha is not None:
        learner.visual.set_constants(alpha=float(half.alpha.mean()))
    before = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for stage in stages(half, learner):
                if stage.visual and before is None:
                    before = [learner.mean_texts(question.classes) for question in (seen, unseen)]
                tune(learner, half, Path(folder), stage, "trial:")
    except DivergenceError as error:
        say(
            f"note: the visual side is left as it came, for its trial diverged ({error.reason}); "
            f"lower {error.setting} to have it tuned"
        )
        return Trial(None, None)
    if before is None:  # there is no visual side to try
        return None
    return Trial(
        _gains(learner, before[0], task.scale, seen),
        _gains(learner, before[1], task.scale, unseen),
    )


def promises(task: TuningTask, trial: Trial | None) -> bool:
    """Return whether the visual side may help seen and unseen classes, as far as they were asked.

    If not, tuning it is not worth the time. Where no trial was possible, validation images will
    tell afterwards; without these nothing could.
    """
    if trial is None:
        return len(task.val) > 0
    return best_strength(trial.seen, trial.unseen) > 0


def choose_strength(
    learner: Learner,
    task: TuningTask,
    trial: Trial | None,
    before: Float[Tensor, "classes dim"],
) -> None:
    """Set the tuned model's κ.

    What it does to seen classes is asked of the tuned model itself where there are validation
    images; what it does to unseen ones only the trial knows.

    Args:
        learner: as tuned.
        task: what it was tuned on.
        trial: of this task, if there was one.
        before: class embeddings of the tuned classes before the visual side was tuned.
    """
    seen = _gains(learner, before, task.scale, _validation(task)) if len(task.val) else None
    if seen is None and trial is not None:
        seen = trial.seen
    learner.set_strength(best_strength(seen, trial.unseen if trial else None))


def best_strength(*asked: Gains | None) -> float:
    """Return the κ whose smallest gain is the largest, of those that surely gain wherever asked.

    So what helps some classes is not paid for by others. With no such κ, or nobody to ask, it
    is 0: the visual side stays as it came. Where only seen or only unseen classes could be asked,
    they decide alone.
    """
    known = [gains for gains in asked if gains is not None]
    best, value = _LEAST_GAIN, 0.0
    for place, strength in enumerate(GRID):
        least = min((gains.mean[place] for gains in known), default=0.0)
        sure = all(g.mean[place] > _STANDARD_ERRORS * g.error[place] for g in known)
        if sure and least > best:
            best, value = least, strength
    return value


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
        unseen = _joined(unseen, _validation(others))
    else:
        odd = every_second(own.train.labels)
        seen = _training_images(own, odd)
        own = with_rows(own, ~odd)
    names = ("tuning.epochs", "visual.epochs", "visual.far_epochs")
    values = config.values()
    shorter = config.with_settings({name: -(-values[name] // 2) for name in names})
    return refilled(replace(own, config=shorter)), seen, unseen


def _joined(one: _Question, other: _Question) -> _Question:
    """Return images of the same classes as one question."""
    return replace(
        one,
        frozen=torch.cat([one.frozen, other.frozen]),
        tokens=torch.cat([one.tokens, other.tokens]),
        labels=torch.cat([one.labels, other.labels]),
    )


def _among(task: TuningTask, inside: Bool[Tensor, " classes"]) -> TuningTask:
    """Return the task with some of its classes; its bank is left as it is."""
    classes = tuple(c for c, chosen in zip(task.tuned, inside.tolist(), strict=True) if chosen)
    wanted = torch.tensor(classes)
    val = torch.isin(task.val.labels, wanted)
    return replace(
        with_rows(task, torch.isin(task.train.labels, wanted)),
        tuned=classes,
        val=task.val.rows(val.nonzero().squeeze(1)),
        val_tokens=None if task.val_tokens is None else task.val_tokens[val],
        reference=task.reference[inside.nonzero().squeeze(1).to(task.reference.device)],
    )


def _validation(task: TuningTask) -> _Question:
    if task.val_tokens is None:
        raise ValueError("validation images without tokens")
    labels = task.val.labels_among(task.tuned)
    return _Question(task.tuned, task.val.embeddings, task.val_tokens, labels)


def _training_images(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> _Question:
    if task.views is None or task.views.tokens is None:
        raise ValueError("training images without tokens")
    labels = task.train.labels_among(task.tuned)
    frozen, tokens = task.views.embeddings[0][chosen], task.views.tokens[0][chosen]
    return _Question(task.tuned, frozen, tokens, labels[chosen])


@torch.no_grad()
def _gains(learner: Learner, before: Tensor, scale: float, question: _Question) -> Gains | None:
    """Return what each κ gains; the learner's own κ is put back afterwards."""
    if len(question.labels) < 2:  # one image has no standard error
        return None
    texts, labels = learner.mean_texts(question.classes), question.labels.to(before.device)
    losses = [calibrated_losses(scale * question.frozen.to(before) @ before.T, labels)]
    own = learner.strength
    for strength in GRID[1:]:
        learner.set_strength(strength)
        images = learner.embed_tokens(question.tokens)
        losses.append(calibrated_losses(scale * images @ texts.T, labels))
    learner.set_strength(own)
    gains = torch.stack([losses[0] - one for one in losses]).double()
    error = gains.std(dim=1) / len(labels) ** 0.5
    return Gains(tuple(gains.mean(dim=1).tolist()), tuple(error.tolist()))
