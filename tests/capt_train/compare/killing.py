"""`capt-compare` in which a worker that meets one prompt is killed, as by a lack of memory."""

import os
import signal

from capt_train.cli.compare import main as compare
from capt_train.compare import run
from capt_train.compare.plan import Cell

_measure = run._measure_one


def _measure_or_die(cell: Cell, calibrations: tuple[str, ...]) -> object:
    if cell.config.prompt.words == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    return _measure(cell, calibrations)


def main() -> None:
    """Run the command with such workers."""
    run._measure_one = _measure_or_die
    compare()
