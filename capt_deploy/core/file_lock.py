"""One holder at a time, across threads and processes; a kill sets the lock free."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_SECONDS_BETWEEN_TRIES = 0.05
_open: set[IO[bytes]] = set()  # files of locks, held or tried for
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing; wait as long as it takes.

    The lock is the operating system's, not the file: one that a dead process left is free.

    Args:
        path: of the file; nothing is written into it.
        waiting: called once, if somebody else holds the lock.

    Raises:
        OSError: the file cannot be made or locked.
    """
    file = _try(path)
    if file is None:
        waiting()
    while file is None:
        time.sleep(_SECONDS_BETWEEN_TRIES)  # waiting inside the system call is deaf to Ctrl-C
        file = _try(path)
    try:
        yield
    finally:
        _release(file)


@contextmanager
def file_lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody else does; yield whether it is held.

    Raises:
        OSError: the file cannot be made or locked.
    """
    file = _try(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            _release(file)


def _try(path: Path) -> IO[bytes] | None:
    """Return the file that holds the lock until it is released; None if it is taken."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    _open.add(file)
    held = False
    try:
        # Whoever held it may have removed the file: then this lock is on a file without a name,
        # and the next one to come would make another.
        held = _lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        pass
    finally:
        if not held:
            _close(file)
    return file if held else None


def _release(file: IO[bytes]) -> None:
    if file.closed:  # this is a forked copy, and the lock is not its own
        return
    try:
        # Closing alone would not: a forked copy has the file open, too, until it closes it.
        _unlock(file.fileno())
    finally:
        _close(file)


def _close(file: IO[bytes]) -> None:
    _open.discard(file)
    file.close()


def _close_in_copy() -> None:
    """Close what a forked copy has open of its parent's locks, or they outlive the parent."""
    while _open:
        _open.pop().close()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_in_copy)


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        if cause.errno in _TAKEN:
            return False
        raise
    return True


def _unlock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
