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
from capt_train.tune.stages import TuningTask, text_stage, visual_stage
from capt_train.tune.tune import DivergenceError, tune

_FOLDS, _FOLDS_WITH_VISUAL = 4, 2  # each fold costs a tuning; with the visual side that is minutes
_FEWEST = 8  # training images


def out_of_fold_logits(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    strength: float,
    rows_of: Callable[[Learner], Float[Tensor, "classes dim"]],
) -> tuple[Float[Tensor, "samples classes"], Int[Tensor, " samples"]]:
    """Return each training image's logits by a model that was tuned without it.

    The images of a class are spread over the folds. With one image a class, a fold leaves whole
    classes out, which a shared context must then know by name: such confidences are low rather
    than high.

    Args:
        task: the task that the model was tuned on, with embedded views.
        make: returns a new learner for the given classes.
        strength: κ of the model.
        rows_of: returns the class rows Ŵ_c of a tuned learner.

    Returns:
        z = scale·f·Ŵ_c + bias, and the labels as positions among the tuned classes. Both are empty
        with fewer than eight images or where a tuning diverged; a note says so.
    """
    labels = task.train.labels_among(task.tuned)
    logits = torch.zeros((len(labels), len(task.tuned)))
    if len(labels) < _FEWEST:
        say("note: confidences are not calibrated: too few images")
        return logits[:0], labels[:0]
    count = _FOLDS_WITH_VISUAL if strength and task.alpha is not None else _FOLDS
    folds = torch.empty_like(labels)
    folds[labels.argsort(stable=True)] = torch.arange(len(labels)) % count
    for fold in range(count):
        held = folds == fold
        rest = task.with_rows(~held).with_new_bank()
        learner = make(task.tuned)
        if rest.alpha is not None:
            learner.set_alpha(float(rest.alpha.mean()))
        learner.set_strength(float(strength > 0))  # as the model was tuned; κ came afterwards
        try:
            with tempfile.TemporaryDirectory() as folder:
                label = f"cross-validation {fold + 1}/{count}:"
                if text := text_stage(task.config, learner):
                    tune(learner, rest, Path(folder), text, label)
                if learner.visual is not None:
                    rest = replace(rest, class_rows=learner.class_rows(task.tuned))
                    tune(learner, rest, Path(folder), visual_stage(task.config), label)
        except DivergenceError as error:  # the run itself is tuned already
            say(
                "note: confidences are not calibrated: cross-validation diverged "
                f"({error.reason}); lower {error.setting} and tune again"
            )
            return logits[:0], labels[:0]
        learner.set_strength(strength)
        cosines = _images(learner, task, held) @ rows_of(learner).cpu().T
        logits[held] = task.scale * cosines + learner.backbone.logit_bias
    return logits, labels


@torch.no_grad()
def _images(learner: Learner, task: TuningTask, chosen: Tensor) -> Float[Tensor, "samples dim"]:
    tokens = None if task.views is None else task.views.tokens
    if learner.visual is None or tokens is None:
        return task.train.embeddings[chosen]
    return learner.embed_tokens(tokens[0][chosen]).cpu()
