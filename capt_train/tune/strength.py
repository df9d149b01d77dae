"""Choose κ, how much of the visual side's tuning to keep (METHOD 5), by a trial (ours).

Where the frozen vision tower is right already, adapters and experts can only overfit, and no loss
on training images shows it. Images of classes that were not tuned on do.
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
from capt_train.tune.stages import TuningTask, stages
from capt_train.tune.tune import DivergenceError, tune

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidates for κ
_STANDARD_ERRORS = 2.0  # a gain must exceed 0 by this many
_LEAST_GAIN = 1e-3  # nats; smaller gains may be rounding
_FEWEST_CLASSES = 4  # two problems of two classes each


@dataclass(frozen=True)
class Gains:
    """For each κ of GRID, how much it lowers the calibrated NLL of held-out images, in nats.

    The baseline is the model before its visual side was tuned.
    """

    mean: tuple[float, ...]
    error: tuple[float, ...]  # standard error of the mean


@dataclass(frozen=True)
class Trial:
    """The result of a short tuning on half of the classes.

    A value is None where too few images could be held out; both are after a diverged tuning.
    """

    seen: Gains | None  # on held-out images of the tuned half
    unseen: Gains | None  # on images of the other half

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trial":
        """Read the JSON form that `asdict` gives.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        gains: list[Gains | None] = []
        for name in ("seen", "unseen"):
            record = values[name]
            if record is None:
                gains.append(None)
                continue
            mean, error = (tuple(map(float, record[key])) for key in ("mean", "error"))
            if not len(mean) == len(error) == len(GRID):
                raise ValueError(f"{name}: expected {len(GRID)} gains")
            gains.append(Gains(mean, error))
        return cls(*gains)


@dataclass(frozen=True)
class _HeldOut:
    """Images that the tuning has not seen."""

    classes: tuple[int, ...]
    frozen: Float[Tensor, "samples dim"]  # f⁰
    tokens: Float[Tensor, "samples tokens width"]
    labels: Int[Tensor, " samples"]  # positions in `classes`


def run_trial(task: TuningTask, make: Callable[[tuple[int, ...]], Learner]) -> Trial | None:
    """Tune on half of the classes for half as long and measure κ on held-out images.

    Without validation images, every second training image is held out.

    Args:
        task: the run's task, with views and tokens.
        make: returns a new learner for the given classes.

    Returns:
        The trial; None with fewer than four classes or without a visual stage.
    """
    if len(task.tuned) < _FEWEST_CLASSES:
        return None
    say("trying on half of the classes how much of the visual tuning to keep")
    half, seen, unseen = _halved(task)
    learner = make(half.tuned)
    if half.alpha is not None:
        learner.set_alpha(float(half.alpha.mean()))
    before = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for stage in stages(half, learner):
                if stage.visual and before is None:
                    before = [learner.mean_texts(images.classes) for images in (seen, unseen)]
                tune(learner, half, Path(folder), stage, "trial on half of the classes:")
    except DivergenceError as error:
        say(
            f"note: the visual side stays as it was, because its trial diverged ({error.reason}); "
            f"lower {error.setting} to tune it"
        )
        return Trial(None, None)
    if before is None:
        return None
    return Trial(
        _gains(learner, before[0], task.scale, seen),
        _gains(learner, before[1], task.scale, unseen),
    )


def worth_tuning(task: TuningTask, trial: Trial | None) -> bool:
    """Tell whether tuning the visual side may help seen and unseen classes.

    Without a trial, validation images can still judge afterwards; without these, nothing could.
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
    """Set the κ of a tuned learner.

    The gain on seen classes is measured on the tuned model itself where there are validation
    images; only the trial knows the gain on unseen classes.

    Args:
        learner: as tuned.
        task: the task it was tuned on.
        trial: the trial of this task, if there was one.
        before: embeddings of the tuned classes before the visual side was tuned.
    """
    seen = _gains(learner, before, task.scale, _validation(task)) if len(task.val) else None
    if seen is None and trial is not None:
        seen = trial.seen
    learner.set_strength(best_strength(seen, trial.unseen if trial else None))


def best_strength(*gains: Gains | None) -> float:
    """Return the κ whose smallest gain is largest, among those that surely gain everywhere.

    So no group of classes pays for another. Unknown gains (None) do not vote. The result is 0 where
    no κ qualifies or nothing is known: the visual side stays as it was.
    """
    known = [gain for gain in gains if gain is not None]
    best, strength = _LEAST_GAIN, 0.0
    for place, candidate in enumerate(GRID):
        least = min((gain.mean[place] for gain in known), default=0.0)
        sure = all(gain.mean[place] > _STANDARD_ERRORS * gain.error[place] for gain in known)
        if sure and least > best:
            best, strength = least, candidate
    return strength


def _halved(task: TuningTask) -> tuple[TuningTask, _HeldOut, _HeldOut]:
    """Return the trial's task, held-out images of its classes, and images of the other classes."""
    config, count = task.config, len(task.tuned)
    draw = torch.Generator().manual_seed(config.seed)
    inside = torch.zeros(count, dtype=torch.bool)
    inside[torch.randperm(count, generator=draw)[: count // 2]] = True
    half, rest = task.among(inside), task.among(~inside)
    unseen = _training_images(rest, torch.ones(len(rest.train), dtype=torch.bool))
    if len(half.val):
        seen = _validation(half)
        unseen = _joined(unseen, _validation(rest))
    else:
        odd = every_second(half.train.labels)
        seen = _training_images(half, odd)
        half = half.with_rows(~odd)
    values = config.values()
    names = ("tuning.epochs", "visual.epochs", "visual.far_epochs")
    shorter = config.with_settings({name: -(-values[name] // 2) for name in names})
    return replace(half, config=shorter).with_new_bank(), seen, unseen


def _joined(first: _HeldOut, second: _HeldOut) -> _HeldOut:
    """Return the images of both, which are of the same classes."""
    return replace(
        first,
        frozen=torch.cat([first.frozen, second.frozen]),
        tokens=torch.cat([first.tokens, second.tokens]),
        labels=torch.cat([first.labels, second.labels]),
    )


def _validation(task: TuningTask) -> _HeldOut:
    if task.val_tokens is None:
        raise ValueError("expected validation images with tokens")
    labels = task.val.labels_among(task.tuned)
    return _HeldOut(task.tuned, task.val.embeddings, task.val_tokens, labels)


def _training_images(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> _HeldOut:
    if task.views is None or task.views.tokens is None:
        raise ValueError("expected training images with tokens")
    labels = task.train.labels_among(task.tuned)
    frozen, tokens = task.views.embeddings[0][chosen], task.views.tokens[0][chosen]
    return _HeldOut(task.tuned, frozen, tokens, labels[chosen])


@torch.no_grad()
def _gains(learner: Learner, before: Tensor, scale: float, images: _HeldOut) -> Gains | None:
    """Return the gain of each κ; the learner's κ is restored afterwards."""
    if len(images.labels) < 2:  # one image has no standard error
        return None
    texts, labels = learner.mean_texts(images.classes), images.labels.to(before.device)
    losses = [calibrated_losses(scale * images.frozen.to(before) @ before.T, labels)]
    strength = learner.strength
    for candidate in GRID[1:]:
        learner.set_strength(candidate)
        embeddings = learner.embed_tokens(images.tokens)
        losses.append(calibrated_losses(scale * embeddings @ texts.T, labels))
    learner.set_strength(strength)
    gains = torch.stack([losses[0] - loss for loss in losses]).double()
    error = gains.std(dim=1) / len(labels) ** 0.5
    return Gains(tuple(gains.mean(dim=1).tolist()), tuple(error.tolist()))
