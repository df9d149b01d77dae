"""Tune the text side of a learner: what epochs train, then the map and the rows."""

from pathlib import Path

import torch

from capt_train.confusion.bank import ConfusionBank
from capt_train.method.class_rows import RowTask
from capt_train.method.learner import Learner
from capt_train.parallel import agree_on
from capt_train.tune.checkpoint import TuningState, save_checkpoint
from capt_train.tune.fit_map import fit_maps, map_task
from capt_train.tune.stages import TuningTask, text_prefix, text_stage
from capt_train.tune.tune import BEST, tune


def tune_text_side(
    learner: Learner, task: TuningTask, folder: Path, label: str = "tuning"
) -> tuple[TuningState | None, ConfusionBank | None]:
    """Tune the text side in place and write its checkpoint.

    Args:
        learner: the trained parts.
        task: images, classes and settings; the settings fix the map's side and ridge.
        folder: where checkpoints are written.
        label: first words of the progress line.

    Returns:
        The state of the training loop, None where nothing is trained by epochs; and the bank.

    Raises:
        DivergenceError: a loss term is not finite.
        RunError: a checkpoint in `folder` belongs to another run.
    """
    state, bank = None, task.bank
    if stage := text_stage(task, learner):
        state, bank = tune(learner, task, folder, stage, label)
    if learner.class_map is None and learner.rows is None:
        return state, bank
    fit_closed_form(learner, task)
    save_checkpoint(
        folder / f"{text_prefix(task.config, learner)}{BEST}", learner, state or TuningState()
    )
    return state, bank


@torch.no_grad()
def fit_closed_form(learner: Learner, task: TuningTask) -> None:
    """Fit the map behind the prompts as they are, and then the rows."""
    class_map, settings = learner.class_map, task.config.map
    if class_map is not None:
        class_map.matrix.zero_()
        texts = learner.texts(task.tuned).embeddings.float()
        if settings.side is None or settings.ridge is None:
            raise ValueError("expected settings with the side and the ridge of the map")
        matrix = fit_maps(map_task(task, texts), settings.side, [settings.ridge])[settings.ridge]
        class_map.matrix.copy_(matrix)
        agree_on(class_map)
    if learner.rows is not None:
        learner.rows.fit(_row_task(learner, task))
        agree_on(learner.rows)


def _row_task(learner: Learner, task: TuningTask) -> RowTask:
    """Return what rows are fitted to: images as a visual side tuned so far gives them."""
    images, val = task.train.embeddings, task.val.embeddings
    if task.config.visual.joint and learner.visual is not None and task.views is not None:
        if task.views.tokens is not None:
            images = learner.embed_tokens(task.views.tokens[0])
        if task.val_tokens is not None and len(task.val):
            val = learner.embed_tokens(task.val_tokens)
    device = task.reference.device
    return RowTask(
        images.to(device),
        task.labels.to(device),
        learner.mean_texts(task.tuned),
        task.reference,
        task.scale,
        task.config.loss_weights,
        task.config.seed,
        val.to(device),
        task.val.labels_among(task.tuned).to(device),
    )
