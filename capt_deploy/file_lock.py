"""One holder at a time, across threads and processes; a kill sets the lock free."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS_BETWEEN_TRIES = 0.05
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
    descriptor = _try(path)
    if descriptor is None:
        waiting()
    while descriptor is None:
        time.sleep(_SECONDS_BETWEEN_TRIES)  # waiting inside the system call is deaf to Ctrl-C
        descriptor = _try(path)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def file_lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody else does; yield whether it is held.

    Raises:
        OSError: the file cannot be made or locked.
    """
    descriptor = _try(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _try(path: Path) -> int | None:
    """Return the descriptor that holds the lock until it is closed; None if it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held = False
    try:
        # Whoever held it may have removed the file: then this lock is on a file without a name,
        # and the next one to come would make another.
        held = _lock(descriptor) and os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        pass
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None


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
