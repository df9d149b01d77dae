"""Detect forked copies of a process, in which threads and device handles do not work."""

import ctypes
import os
from typing import Any
from weakref import WeakSet

from capt_deploy.core.errors import BackendError

_never_freed_in_copies: "WeakSet[Any]" = WeakSet()


class Process:
    """The process in which an object was created."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        """Return whether the code runs in that process, and not in a forked copy."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Raise an error in a forked copy, which would wait for threads that it does not have.

        Raises:
            BackendError: the code runs in a forked copy.
        """
        if not self.is_this:
            raise BackendError(
                f"expected the process {self._id} that loaded the classifier, came its forked copy "
                f"{os.getpid()}; load it only after the fork, never before it, or start processes "
                f'with multiprocessing.get_context("spawn")'
            )


def never_free_in_copies(value: Any) -> None:
    """Let forked copies of this process end without freeing `value`.

    Libraries join their threads when they free a value. A copy has no such threads: it would crash
    or hang, at the latest when it exits.
    """
    _never_freed_in_copies.add(value)


def _keep() -> None:
    for value in _never_freed_in_copies:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep)
