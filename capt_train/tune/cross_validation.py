"""Held-out predictions on training images, for runs without validation images."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.console import say
from capt_train.method.learner import Learner
from capt_train.tune.folds import photo_folds
from capt_train.tune.stages import TuningTask, visual_stage
from capt_train.tune.text_side import tune_text_side
from capt_train.tune.tune import DivergenceError, tune

_FOLDS, _FOLDS_WITH_VISUAL = 4, 2  # each fold costs a tuning; with the visual side that is minutes


def out_of_fold_logits(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    strength: float,
    logits_of: Callable[[Learner, Tensor], Tensor],
    rows: Int[Tensor, " rows"],
) -> Float[Tensor, "rows classes"]:
    """Return the logits of training images by models that were tuned without them.

    The images of a class are spread over the folds; a single one is never held out.

    Args:
        task: the task that the model was tuned on, with embedded views.
        make: returns a new learner for the given classes.
        strength: κ of the model.
        logits_of: returns the logits of a tuned learner over the tuned classes.
        rows: the training images that are answered.

    Returns:
        z = scale·f·Ŵ_c + b_c + bias; NaN for images that are not held out, and for all
        where a tuning diverged, which a note says.
    """
    labels = task.labels
    logits = torch.full((len(rows), len(task.tuned)), torch.nan)
    count = _FOLDS_WITH_VISUAL if strength and task.alpha is not None else _FOLDS
    no_class = torch.full((len(task.tuned),), -1)
    folds = photo_folds(labels, task.train.embeddings, no_class, count)
    for fold in range(count):
        held = folds == fold
        answered = held[rows]
        if not answered.any():
            continue
        rest = task.with_rows(~held).with_new_bank()
        learner = make(task.tuned)
        if rest.alpha is not None:
            learner.set_alpha(float(rest.alpha.mean()))
        learner.set_strength(float(strength > 0))  # as the model was tuned; κ came afterwards
        try:
            with tempfile.TemporaryDirectory() as folder:
                label = f"cross-validation {fold + 1}/{count}:"
                tune_text_side(learner, rest, Path(folder), label)
                if learner.visual is not None and not task.config.visual.joint:
                    rest = replace(rest, class_rows=learner.class_rows(task.tuned))
                    tune(learner, rest, Path(folder), visual_stage(task.config), label)
        except DivergenceError as error:  # the run itself is tuned already
            say(
                "note: confidences are not calibrated: cross-validation diverged "
                f"({error.reason}); lower {error.setting} and tune again"
            )
            return torch.full_like(logits, torch.nan)
        learner.set_strength(strength)
        logits[answered] = logits_of(learner, _images(learner, task, rows[answered])).cpu()
    return logits


@torch.no_grad()
def _images(learner: Learner, task: TuningTask, chosen: Tensor) -> Float[Tensor, "chosen dim"]:
    tokens = None if task.views is None else task.views.tokens
    if learner.visual is None or tokens is None:
        return task.train.embeddings[chosen]
    return learner.embed_tokens(tokens[0][chosen]).cpu()
