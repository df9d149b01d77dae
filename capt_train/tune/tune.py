"""Tuning one stage: epoch by epoch, as long as it helps, resumable at any of them."""

from dataclasses import replace
from pathlib import Path

from capt_deploy.core.console import progress
from capt_deploy.core.errors import RunError
from capt_train.confusion.bank import ConfusionBank
from capt_train.method.learner import Learner
from capt_train.tune.checkpoint import TuningState, load_checkpoint, save_checkpoint
from capt_train.tune.epochs import Epochs
from capt_train.tune.stages import Stage, TuningTask

BEST, LAST = "best.safetensors", "last.safetensors"


class DivergenceError(RunError):
    """A tuning that left the finite numbers."""

    def __init__(self, folder: Path, reason: str, setting: str, kept: str = "") -> None:
        """Say what happened.

        Args:
            folder: of the checkpoints.
            reason: what became nan, and when.
            setting: the one to lower.
            kept: which checkpoint stays, if one does.
        """
        super().__init__(f"{folder}: {reason}; lower {setting} and tune again{kept}")
        self.reason, self.setting = reason, setting


def tune(
    learner: Learner, task: TuningTask, folder: Path, stage: Stage, label: str = "tuning"
) -> tuple[TuningState, ConfusionBank | None]:
    """Tune `learner`; on return it holds the best epoch's parameters, which lie in `folder` too.

    Best is the lowest calibrated NLL on validation, or the last epoch where there is none or
    patience is 0. If `folder` holds the checkpoint of an interrupted run, tuning continues from
    it. On a CPU it ends with the very bits that it would have had uninterrupted (on the same
    machine, with the same number of threads); on a GPU with nearly the same numbers, for CUDA's
    kernels are not made deterministic.

    Args:
        learner: what is trained.
        task: what it is trained on.
        folder: for checkpoints.
        stage: which parameters, for how long, and how far they may go.
        label: for the progress.

    Returns:
        Where the tuning ended, and the confusion bank after its last write-back.

    Raises:
        DivergenceError: a loss term is not finite; the last good checkpoint stays.
        RunError: a checkpoint in `folder` is of another run.
    """
    loop = Epochs(learner, task, stage)
    state = TuningState()
    last, best = (folder / f"{stage.name}{name}" for name in (LAST, BEST))
    if last.exists():
        state = loop.load(last)
    label += " both sides" if stage.visual else " the text side"
    with progress(label, stage.epochs, "epochs") as counter:
        counter.advance(state.epoch)
        while state.epoch < stage.epochs and not _stale(state, task, stage.patience):
            try:
                if stage.visual and not last.exists():  # what helps nowhere ends where it began
                    state = TuningState(best_nll=loop.validation_nll())
                    save_checkpoint(best, learner, state)
                terms = loop.epoch(state.epoch)
                nll = loop.validation_nll()
            except FloatingPointError as cause:
                kept = f"; the state before that epoch is in {last.name}" if state.epoch else ""
                rate = f"{'visual' if stage.visual else 'tuning'}.learning_rate"
                reason = f"in epoch {state.epoch + 1} {cause}"
                raise DivergenceError(folder, reason, rate, kept) from cause
            loop.write_back()
            state = _next(state, terms, nll, stage.patience)
            if state.best_epoch == state.epoch:
                save_checkpoint(best, learner, state)
            loop.save(last, state)
            newest = reversed(list(state.history[-1].items()))  # validation first, if there is any
            counter.advance(1, ", ".join(f"{name} {value:.3f}" for name, value in newest))
    load_checkpoint(best, learner)
    return state, loop.bank


def _stale(state: TuningState, task: TuningTask, patience: int) -> bool:
    return bool(len(task.val) and patience and state.epochs_since_best >= patience)


def _next(
    state: TuningState, terms: dict[str, float], nll: float | None, patience: int
) -> TuningState:
    epoch = state.epoch + 1
    history = (*state.history, terms if nll is None else {**terms, "val_nll": nll})
    if not patience or nll is None or state.best_nll is None or nll < state.best_nll:
        return TuningState(epoch, epoch, nll, history)
    return replace(state, epoch=epoch, history=history)
