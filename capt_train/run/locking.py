"""One process at a time in a run folder."""

import getpass
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from capt_deploy.core.errors import RunError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder; a kill sets it free.

    The lock lies among the machine's temporary files, so that a refused run leaves no folder.

    Raises:
        RunError: another process is tuning into it.
    """
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    user = getpass.getuser() if os.name != "posix" else str(os.getuid())
    lock = FileLock(Path(tempfile.gettempdir()) / f"capt-{user}-{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise RunError(f"{folder}: another capt-train is writing this run") from cause
    try:
        yield
    finally:
        lock.release()
