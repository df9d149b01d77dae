"""Threads and device handles do not survive `fork`: notice their use in a forked copy."""

import ctypes
import os
from typing import Any
from weakref import WeakSet

from capt_deploy.core.errors import BackendError

_never_freed_in_copies: "WeakSet[Any]" = WeakSet()


class Process:
    """The process in which something was made."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether this still is that process and no forked copy of it."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Make sure that it is, before waiting for a thread that the copy does not have.

        Raises:
            BackendError: this is a forked copy.
        """
        if not self.is_this:
            raise BackendError(
                f"expected the process {self._id} that loaded the classifier, came its forked copy "
                f"{os.getpid()}; load it only after the fork, never before it, or start processes "
                f'with multiprocessing.get_context("spawn")'
            )


def never_free_in_copies(value: Any) -> None:
    """Let forked copies of this process end without freeing `value`.

    A library that would join its threads, which a copy does not have, crashes or hangs on that,
    at the latest when the copy exits.
    """
    _never_freed_in_copies.add(value)


def _keep() -> None:
    for value in _never_freed_in_copies:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep)
