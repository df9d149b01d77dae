"""Choose κ, how much of the visual side's tuning to keep (METHOD 5), on held-out images (ours).

Where the frozen vision tower is right already, adapters and experts can only overfit, and no loss
on training images shows it. Validation images do; where there are none, or where classes without
images count as well (`--classes base`), a trial on some of the training images does.
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
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner
from capt_train.parallel import agreed
from capt_train.tune.stages import TuningTask, visual_stage
from capt_train.tune.tune import DivergenceError, tune

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidates for κ
_STANDARD_ERRORS = 2.0  # a gain must exceed 0 by this many
_LEAST_GAIN = 1e-3  # nats; smaller gains may be rounding
_FEWEST_CLASSES = 4  # two problems of two classes each


@dataclass(frozen=True)
class Gains:
    """For each κ of GRID, how much it lowers the calibrated NLL of held-out images, in nats.

    The baseline is the frozen visual side with the same class rows.
    """

    mean: tuple[float, ...]
    error: tuple[float, ...]  # standard error of the mean


@dataclass(frozen=True)
class Trial:
    """The gains of a tuning on part of the training images.

    A value is None where too few images could be held out; both are after a diverged tuning.
    """

    seen: Gains | None  # on held-out images of its classes
    unseen: Gains | None  # on those of the classes it was not tuned on, with `--classes base`

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
    """Images that neither the class rows nor the visual side were tuned on."""

    class_rows: ClassRows
    frozen: Float[Tensor, "samples dim"]  # f⁰
    tokens: Float[Tensor, "samples tokens width"]
    labels: Int[Tensor, " samples"]  # positions in `class_rows`

    def among(self, inside: Bool[Tensor, " classes"]) -> "_HeldOut":
        """Return the images and rows of some of the classes."""
        rows = inside[self.labels].nonzero().squeeze(1)
        labels = (inside.cumsum(0) - 1)[self.labels[rows]]
        class_rows = self.class_rows.subset(inside.nonzero().squeeze(1).tolist())
        return _HeldOut(class_rows, self.frozen[rows], self.tokens[rows], labels)


def run_trial(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    fit_class_rows: Callable[[TuningTask], ClassRows],
) -> Trial | None:
    """Tune the visual side on half of the images and measure the gain of each κ on others.

    With validation images, these judge; with `--classes base`, the tuning has half of the classes,
    and the images of the other half judge as well. Without validation images, every second shot is
    held out and the class rows are fitted to the rest.

    Args:
        task: the run's task, with views, tokens and class rows.
        make: returns a new learner for the given classes.
        fit_class_rows: fits the text side to a task and returns its class rows.

    Returns:
        The trial; None where the tuning itself will show as much, or with too few classes.
    """
    halves = task.config.classes == "base" and len(task.tuned) >= _FEWEST_CLASSES
    if len(task.val) and not halves:
        return None
    say("trying on half of the images how much of the visual tuning to keep")
    try:
        if len(task.val):
            held_out = _validation(task)
        else:
            odd = every_second(task.train.labels)
            part = task.with_rows(~odd).with_new_bank()
            class_rows = fit_class_rows(part)
            held_out = _training_images(replace(task, class_rows=class_rows), odd)
            task = replace(part, class_rows=class_rows)
        inside = torch.ones(len(task.tuned), dtype=torch.bool)
        if halves:
            draw = torch.Generator().manual_seed(task.config.seed)
            inside[torch.randperm(len(inside), generator=draw)[: len(inside) // 2]] = False
            task = task.among(inside).with_new_bank()
        learner = make(task.tuned)
        if task.alpha is not None:
            learner.set_alpha(float(task.alpha.mean()))
        with tempfile.TemporaryDirectory() as folder:
            tune(learner, task, Path(folder), visual_stage(task.config), "trial:")
    except DivergenceError as error:
        say(
            f"note: the visual side stays as it was, because its trial diverged ({error.reason}); "
            f"lower {error.setting} to tune it"
        )
        return Trial(None, None)
    unseen = _gains(learner, held_out.among(~inside), task.scale) if halves else None
    return Trial(_gains(learner, held_out.among(inside), task.scale), unseen)


def worth_tuning(task: TuningTask, trial: Trial | None) -> bool:
    """Tell whether tuning the visual side may help.

    Without a trial, validation images can still judge afterwards; without these, nothing could.
    """
    if trial is None:
        return len(task.val) > 0
    return best_strength(trial.seen, trial.unseen) > 0


def choose_strength(learner: Learner, task: TuningTask, trial: Trial | None) -> None:
    """Set the κ of a tuned learner.

    The gain on tuned classes is measured on the tuned model itself where there are validation
    images; only the trial knows the gain on classes that were not tuned on.

    Args:
        learner: as tuned.
        task: the task it was tuned on.
        trial: the trial of this task, if there was one.
    """
    seen = _gains(learner, _validation(task), task.scale) if len(task.val) else None
    if seen is None and trial is not None:
        seen = trial.seen
    learner.set_strength(agreed(best_strength(seen, trial.unseen if trial else None)))


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


def _class_rows(task: TuningTask) -> ClassRows:
    if task.class_rows is None:
        raise ValueError("expected a task with class rows")
    return task.class_rows


def _validation(task: TuningTask) -> _HeldOut:
    if task.val_tokens is None:
        raise ValueError("expected validation images with tokens")
    labels = task.val.labels_among(task.tuned)
    return _HeldOut(_class_rows(task), task.val.embeddings, task.val_tokens, labels)


def _training_images(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> _HeldOut:
    if task.views is None or task.views.tokens is None:
        raise ValueError("expected training images with tokens")
    labels = task.train.labels_among(task.tuned)
    frozen, tokens = task.views.embeddings[0][chosen], task.views.tokens[0][chosen]
    return _HeldOut(_class_rows(task), frozen, tokens, labels[chosen])


@torch.no_grad()
def _gains(learner: Learner, images: _HeldOut, scale: float) -> Gains | None:
    """Return the gain of each κ; the learner's κ is restored afterwards."""
    if len(images.labels) < 2:  # one image has no standard error
        return None
    class_rows = images.class_rows
    labels = images.labels.to(class_rows.rows.device)
    losses = [calibrated_losses(class_rows.logits(images.frozen, scale), labels)]
    strength = learner.strength
    for candidate in GRID[1:]:
        learner.set_strength(candidate)
        embeddings = learner.embed_tokens(images.tokens)
        losses.append(calibrated_losses(class_rows.logits(embeddings, scale), labels))
    learner.set_strength(strength)
    gains = torch.stack([losses[0] - loss for loss in losses]).double()
    error = gains.std(dim=1) / len(labels) ** 0.5
    return Gains(tuple(gains.mean(dim=1).tolist()), tuple(error.tolist()))
