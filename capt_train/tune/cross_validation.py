"""Where there are no validation images: what models say of training images left out for them."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.console import say
from capt_train.method.learner import Learner
from capt_train.tune.stages import TuningTask, refilled, stages, with_rows
from capt_train.tune.tune import DivergenceError, tune

_FOLDS, _FOLDS_OF_BOTH_SIDES = 4, 2  # each costs a tuning; with the visual side minutes
_FEWEST = 8  # images that can be left out in turns


def out_of_fold_logits(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    strength: float,
    rows_of: Callable[[Learner], Float[Tensor, "classes dim"]],
) -> tuple[Float[Tensor, "samples classes"], Int[Tensor, " samples"]]:
    """Tune anew without a part of the training images, and ask about that part; all parts in turn.

    The images of a class are spread over the parts. With one image a class, each part leaves whole
    classes out, which the shared context must then know by name: such confidences are low rather
    than high.

    Args:
        task: what the model itself was tuned on, with embedded views.
        make: returns a new learner of some classes.
        strength: κ of the model.
        rows_of: returns Ŵ_c of the tuned classes for a tuned learner.

    Returns:
        z = scale·f·Ŵ_c + bias of each training image by the model that has not seen it, and the
        labels as positions among the tuned classes. None of either with fewer than eight images,
        or where a tuning diverged, which is said.
    """
    labels = task.train.labels_among(task.tuned)
    found = torch.zeros((len(labels), len(task.tuned)))
    if len(labels) < _FEWEST:
        say("note: confidences are not calibrated: there are too few images for it")
        return found[:0], labels[:0]
    count = _FOLDS_OF_BOTH_SIDES if strength and task.alpha is not None else _FOLDS
    folds = torch.empty_like(labels)
    folds[labels.argsort(stable=True)] = torch.arange(len(labels)) % count
    for fold in range(count):
        held = folds == fold
        own = refilled(with_rows(task, ~held))
        learner = make(task.tuned)
        if learner.visual is not None and own.alpha is not None:
            learner.visual.set_constants(alpha=float(own.alpha.mean()))
        learner.set_strength(float(strength > 0))  # as the model was tuned; κ came afterwards
        try:
            with tempfile.TemporaryDirectory() as folder:
                for stage in stages(own, learner):
                    tune(learner, own, Path(folder), stage, f"cross-validation {fold + 1}/{count}:")
        except DivergenceError as error:  # what the run was tuned for is there already
            say(
                "note: confidences are not calibrated: cross-validation diverged "
                f"({error.reason}); lower {error.setting} and tune again"
            )
            return found[:0], labels[:0]
        learner.set_strength(strength)
        cosines = _images(learner, task, held) @ rows_of(learner).cpu().T
        found[held] = task.scale * cosines + learner.backbone.logit_bias
    return found, labels


@torch.no_grad()
def _images(learner: Learner, task: TuningTask, chosen: Tensor) -> Float[Tensor, "samples dim"]:
    tokens = None if task.views is None else task.views.tokens
    if learner.visual is None or tokens is None:
        return task.train.embeddings[chosen]
    return learner.embed_tokens(tokens[0][chosen]).cpu()
