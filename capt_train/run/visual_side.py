"""Tune the visual side of a run against its fixed class rows."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from capt_deploy.core.console import say
from capt_deploy.core.files import write_json
from capt_train.confusion.bank import intensity
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner
from capt_train.parallel import agreed
from capt_train.run import folder as runs
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.stages import TuningTask, visual_stage
from capt_train.tune.strength import Trial, choose_strength, run_trial, worth_tuning
from capt_train.tune.text_side import tune_text_side
from capt_train.tune.tune import tune
from capt_train.tune.views import Views

_Make = Callable[[tuple[int, ...]], Learner]


def with_tokens(task: TuningTask, val: Views | None, learner: Learner) -> TuningTask:
    """Return the task with validation tokens and the α of each training image.

    The learner gets their mean as its constant α (METHOD 4).
    """
    visual = task.config.visual
    logits = task.scale * task.train.embeddings.to(task.reference.device) @ task.reference.T
    alpha = visual.adapter_scale * intensity(logits) ** visual.adapter_exponent
    learner.set_alpha(float(alpha.mean()))
    tokens = None if val is None or val.tokens is None else val.tokens[0]
    return replace(task, val_tokens=tokens, alpha=alpha.cpu())


def tune_visual_side(
    learner: Learner, task: TuningTask, make: _Make, out: Path
) -> tuple[TuningTask, Trial | None, list[TuningState]]:
    """Tune the visual side and set κ, or leave it as it is where held-out images do not gain.

    Args:
        learner: its text side is tuned.
        task: with tokens and the fixed class rows.
        make: returns a new learner for the given classes.
        out: the run folder.

    Returns:
        The task with the bank after its last update, the trial if there was one, and the state of
        the stage if it ran.
    """
    strength, trial = task.config.visual.strength, None
    if strength is None:
        trial = _trial(task, make, out)
        learner.set_strength(float(worth_tuning(task, trial)))
    else:
        learner.set_strength(float(strength > 0))
    states = []
    if learner.visual is not None:
        state, bank = tune(learner, task, out, visual_stage(task.config))
        states, task = [state], replace(task, bank=bank)
        if strength is None:
            choose_strength(learner, task, trial)
        else:
            learner.set_strength(strength)
    say(f"{learner.strength:.0%} of the visual side's tuning is kept (κ = {learner.strength:g})")
    return task, trial, states


def _trial(task: TuningTask, make: _Make, out: Path) -> Trial | None:
    """Return the trial of the run; a resumed run reads the one that it has written."""

    def fit_class_rows(part: TuningTask) -> ClassRows:
        learner = make(part.tuned)
        with tempfile.TemporaryDirectory() as folder:
            tune_text_side(learner, part, Path(folder), "trial:")
        return learner.class_rows(part.tuned)

    if not (out / runs.TRIAL).exists():
        trial = agreed(run_trial(task, make, fit_class_rows))
        write_json(out / runs.TRIAL, trial and asdict(trial))
    return runs.read_trial(out)
