"""Tune one stage: epoch by epoch, with early stopping, resumable after any epoch."""

from dataclasses import replace
from pathlib import Path

from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import RunError
from capt_train.confusion.bank import ConfusionBank
from capt_train.method.learner import Learner
from capt_train.tune.checkpoint import TuningState, load_checkpoint, save_checkpoint
from capt_train.tune.epochs import Epochs
from capt_train.tune.stages import Stage, TuningTask

BEST, LAST = "best.safetensors", "last.safetensors"


class DivergenceError(RunError):
    """A loss term or gradient that is no longer finite."""

    def __init__(self, folder: Path, reason: str, setting: str, kept: str = "") -> None:
        """Build the message.

        Args:
            folder: the folder of the checkpoints.
            reason: what became nan, and when.
            setting: the setting to lower.
            kept: which checkpoint stays, if one does.
        """
        super().__init__(f"{folder}: {reason}; lower {setting} and tune again{kept}")
        self.reason, self.setting = reason, setting


def tune(
    learner: Learner, task: TuningTask, folder: Path, stage: Stage, label: str = "tuning"
) -> tuple[TuningState, ConfusionBank | None]:
    """Tune `learner` in place and leave it with the parameters of the best epoch.

    The best epoch has the lowest calibrated validation NLL; it is the last epoch where there are no
    validation images or patience is 0. If `folder` holds the checkpoint of an interrupted run,
    tuning continues from it: on a CPU with the same bits as an uninterrupted run (same machine and
    number of threads), on a GPU with nearly the same numbers, since CUDA kernels are not made
    deterministic.

    Args:
        learner: the trained parts.
        task: images, classes and settings.
        folder: where checkpoints are written.
        stage: which side is trained, for how long and at which rate.
        label: first words of the progress line.

    Returns:
        The final state, and the confusion bank after its last update.

    Raises:
        DivergenceError: a loss term is not finite; the last good checkpoint stays.
        RunError: a checkpoint in `folder` belongs to another run.
    """
    loop = Epochs(learner, task, stage)
    state = TuningState()
    last, best = (folder / f"{stage.name}{name}" for name in (LAST, BEST))
    if last.exists():
        state = loop.load(last)
    sides = {"text": stage.text, "visual": stage.visual}
    label += f" the {' and '.join(name for name, on in sides.items() if on)} side"
    with progress(label, stage.epochs, "epochs") as counter:
        counter.advance(state.epoch)
        while state.epoch < stage.epochs and not _stopped_early(state, task, stage):
            try:
                if not stage.text and not last.exists():  # the start is a candidate for best
                    state = TuningState(best_nll=loop.validation_nll())
                    save_checkpoint(best, learner, state)
                terms = loop.epoch(state.epoch)
                nll = loop.validation_nll()
            except FloatingPointError as cause:
                kept = f"; the state before that epoch is in {last.name}" if state.epoch else ""
                rate = f"{'tuning' if stage.text else 'visual'}.learning_rate"
                reason = f"in epoch {state.epoch + 1} {cause}"
                raise DivergenceError(folder, reason, rate, kept) from cause
            loop.update_bank()
            state = _next(state, terms, nll, stage.patience)
            if state.best_epoch == state.epoch:
                save_checkpoint(best, learner, state)
            loop.save(last, state)
            terms_shown = reversed(list(state.history[-1].items()))  # validation first
            counter.advance(1, ", ".join(f"{name} {value:.3f}" for name, value in terms_shown))
    if state.epoch < stage.epochs:
        say(
            f"{label}: stopped after epoch {state.epoch}, validation has not improved for "
            f"{state.epochs_since_best} epochs; epoch {state.best_epoch} is kept"
        )
    if state.epoch == stage.epochs and loop.finish():
        save_checkpoint(best, learner, state)
    load_checkpoint(best, learner)
    return state, loop.bank


def _stopped_early(state: TuningState, task: TuningTask, stage: Stage) -> bool:
    return bool(len(task.val) and stage.patience and state.epochs_since_best >= stage.patience)


def _next(
    state: TuningState, terms: dict[str, float], nll: float | None, patience: int
) -> TuningState:
    epoch = state.epoch + 1
    history = (*state.history, terms if nll is None else {**terms, "val_nll": nll})
    if not patience or nll is None or state.best_nll is None or nll < state.best_nll:
        return TuningState(epoch, epoch, nll, history)
    return replace(state, epoch=epoch, history=history)
