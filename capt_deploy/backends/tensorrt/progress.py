"""Long builds: show how far they are, and stop them on Ctrl-C."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from capt_deploy.core.console import Progress

T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 0.2


def cancellable(build: Callable[[threading.Event], T]) -> T:
    """Return what `build` returns, and let Ctrl-C stop it.

    It runs in a thread of its own. While a library builds, no Python code runs in its thread but
    what it calls back, and there an exception would end the process.

    Args:
        build: ends soon after the event that it is given is set.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the build has ended.
        Exception: whatever `build` raises.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, "capt-build") as thread:  # leaving it waits for the build's end
        try:
            future = thread.submit(build, cancelled)
            while not wait([future], _SECONDS_BETWEEN_LOOKS).done:  # Windows is deaf while it waits
                pass
        except BaseException:
            cancelled.set()
            raise
        return future.result()


def make_monitor(trt: Any, cancelled: threading.Event) -> Any:
    """Return an `IProgressMonitor` that shows the steps of the whole build and what it is doing.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        cancelled: once it is set, the library is told to stop at its next step.
    """
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # its bindings know no super()
            self._lock = threading.Lock()  # builders call from several threads
            self._whole: str | None = None
            self._shown: Progress | None = None
            self._left = 0  # steps of the whole

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock, suppress(Exception):  # which the library could not bear
                if parent_phase is None and self._shown is None:
                    self._whole, self._left = phase_name, num_steps
                    self._shown = Progress("building an engine", num_steps, "steps")
                elif self._shown is not None:
                    self._shown.advance(0, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock, suppress(Exception):
                if self._shown is not None and phase_name == self._whole:
                    self._left -= 1
                    self._shown.advance()
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock, suppress(Exception):
                if self._shown is not None and phase_name == self._whole:
                    if not cancelled.is_set():
                        self._shown.advance(self._left)  # libraries leave the last steps out
                    self._shown.close()
                    self._shown = None

    return Monitor()
