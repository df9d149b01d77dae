"""Engines on disk, so that a machine builds each of them once.

An entry is one file, written atomically: a line of JSON (format, key, size and SHA-256 of the
body), then the body. Every read checks all of it, and a damaged entry is built again: losing the
cache costs time, never a result. Whatever the folder is, only regular files whose names are the
cache's own are ever removed; no folder, and nothing that a link leads to.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from capt_deploy.backends.tensorrt.key import EngineKey
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError, ConfigError
from capt_deploy.core.files import cache_folder, open_file, write_bytes

T = TypeVar("T")

LIMIT = "CAPT_ENGINE_CACHE_GB"  # environment variable
_GIGABYTES = 10.0
_FORMAT = 2
_LONGEST_HEADER = 2**16  # bytes
_ENTRY, _LOCK = ".entry", ".lock"
_NAME = r"(?:engine|timing|runtime)-[0-9a-f]{32}"
_LEFTOVER = re.compile(rf"({_NAME}){_LOCK}|\.({_NAME}){_ENTRY}\.[0-9a-f]+\.tmp")


class DamagedError(Exception):
    """An entry is not as it was written."""


@dataclass(frozen=True)
class Entry:
    """One file of the cache, as its header describes it; the body is not checked."""

    path: Path
    bytes: int
    used: float  # seconds since 1970
    key: dict[str, Any] | None  # None: the header is damaged


class EngineCache:
    """A folder of entries. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        """Choose a folder; it is made when something is written.

        Raises:
            ConfigError: the environment sets a limit that is not a size; or see `cache_folder`.
        """
        self.folder = folder or cache_folder() / "engines"
        self._limit = _limit()

    def obtain(
        self, key: EngineKey, build: Callable[[], bytes], load: Callable[[bytes], T | None]
    ) -> T:
        """Load an entry; build it where it is missing or `load` returns None for it.

        Processes and threads that need the same entry at once build it once.

        Raises:
            BackendError: `load` returns None for what was just built.
            Exception: as `build`; then nothing is kept.
        """
        if (loaded := self.load(key, load)) is not None:
            return loaded
        with self._locked(key):
            # Another process may have built it while this one waited.
            if (loaded := self.load(key, load)) is not None:
                return loaded
            data = build()
            if (loaded := load(data)) is None:
                raise BackendError(f"{key.library}: the engine just built does not load here")
            self.write(key, data)
        return loaded

    def read(self, key: EngineKey) -> bytes | None:
        """Return the body of an entry; None if there is none, or it is damaged."""
        path = self.path_of(key)
        try:
            body = _read_body(path, key)
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as cause:
            say(f"engine cache: {path} cannot be used ({cause})")
            return None
        with suppress(OSError):  # another user's file, for example
            os.utime(path)  # the least recently used entries are pruned first
        return body

    def write(self, key: EngineKey, body: bytes) -> None:
        """Keep an entry; where that is impossible, say so and go on."""
        path = self.path_of(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, encode(key, body))
            self.prune(keep=path)
        except OSError as cause:
            say(f"engine cache: {path} cannot be written ({cause}); going on without it")

    def entries(self) -> list[Entry]:
        """Return the entries, the most recently used first."""
        entries = []
        for path in self.folder.glob(f"*{_ENTRY}"):
            if not re.fullmatch(_NAME, path.stem) or not _is_regular(path):
                continue
            with suppress(OSError):  # removed meanwhile
                status = path.lstat()
                try:
                    key = read_key(path)
                except DamagedError:
                    key = None
                entries.append(Entry(path, status.st_size, status.st_mtime, key))
        return sorted(entries, key=lambda entry: entry.used, reverse=True)

    def prune(self, keep: Path | None = None) -> list[Entry]:
        """Remove damaged entries, the rest of killed builds, and the least recently used entries.

        Args:
            keep: an entry that stays, however large it is.

        Returns:
            The entries that were removed.
        """
        total = 0
        removed: list[Entry] = []
        for entry in self.entries():
            if entry.path == keep or (entry.key and total + entry.bytes <= self._limit):
                total += entry.bytes
                continue
            with suppress(OSError):  # Windows does not remove a file that somebody reads
                entry.path.unlink()
                removed.append(entry)
        self._remove_leftovers()
        return removed

    def path_of(self, key: EngineKey) -> Path:
        """Return the file of an entry, whether it exists or not."""
        return self.folder / f"{key.name}{_ENTRY}"

    def load(self, key: EngineKey, load: Callable[[bytes], T | None]) -> T | None:
        """Load an entry; None where it is missing or `load` returns None for it."""
        body = self.read(key)
        loaded = None if body is None else load(body)
        if body is not None and loaded is None:
            say(f"engine cache: {self.path_of(key)} does not load here")
        return loaded

    @contextmanager
    def _locked(self, key: EngineKey) -> Iterator[None]:
        """Keep others from building the same entry; where that is impossible, go on without."""
        lock = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _lock_of(self.folder / f"{key.name}{_LOCK}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                say("engine cache: another process builds this engine; waiting for it")
                lock.acquire()
        except OSError as cause:
            say(f"engine cache: {self.folder} cannot be used ({cause}); building without it")
        try:
            yield
        finally:
            if lock is not None:
                lock.release()  # does nothing if it is not held

    def _remove_leftovers(self) -> None:
        """Remove locks without an entry, and half-written entries that nobody writes any more."""
        for path in [*self.folder.glob("*")]:
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or not _is_regular(path):
                continue
            name = match[1] or match[2]
            lock = self.folder / f"{name}{_LOCK}"
            with suppress(OSError, Timeout), _lock_of(lock).acquire(blocking=False):
                if path != lock:
                    path.unlink(missing_ok=True)
                if not (self.folder / f"{name}{_ENTRY}").exists() and _is_regular(lock):
                    lock.unlink(missing_ok=True)


def _is_regular(path: Path) -> bool:
    """Return whether a path is a file itself, not a link to one."""
    return path.is_file() and not path.is_symlink()


def _lock_of(path: Path) -> FileLock:
    """Return a lock; raises OSError where its file is a link, which locking might empty."""
    if path.is_symlink():
        raise OSError(f"{path} is a link")
    return FileLock(path)


def encode(key: EngineKey, body: bytes) -> bytes:
    """Return the content of an entry."""
    digest = hashlib.sha256(body).hexdigest()
    header = {"format": _FORMAT, "key": key.to_json(), "bytes": len(body), "sha256": digest}
    return json.dumps(header).encode() + b"\n" + body


def read_key(path: Path) -> dict[str, Any]:
    """Return the key of an entry without reading its body.

    Raises:
        OSError: the file cannot be read.
        DamagedError: the header is damaged, or the file is cut off.
    """
    with open_file(path) as file:
        return _read_header(file)[0]


def _read_body(path: Path, key: EngineKey) -> bytes:
    """Return the body of an entry; raises as `read_key`, also for entries of other users.

    Engines are code, and a hash does not tell who wrote them: only this user and root are trusted.
    """
    with open_file(path) as file:
        if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
            raise DamagedError("it belongs to another user")
        stored_key, size, digest = _read_header(file)
        if stored_key != key.to_json():
            raise DamagedError("it is for something else")
        body = file.read(size)  # `read()` alone grows its memory step by step
    if hashlib.sha256(body).hexdigest() != digest:
        raise DamagedError("its content was changed")
    return body


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int, str]:
    """Return the key, the size of the body, which is checked, and its hash, which is not."""
    try:
        header = json.loads(file.readline(_LONGEST_HEADER))
        form, key, digest = header["format"], dict(header["key"]), str(header["sha256"])
        written = header["bytes"]
    except (ValueError, TypeError, LookupError, RecursionError) as cause:
        raise DamagedError("its header is damaged") from cause
    size = os.fstat(file.fileno()).st_size - file.tell()
    if (form, written) != (_FORMAT, size):
        raise DamagedError("it was cut off, or has another format")
    return key, size, digest


def _limit() -> float:
    """Return how many bytes the cache may hold."""
    text = os.environ.get(LIMIT, str(_GIGABYTES))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = float("nan")
    if not gigabytes >= 0:
        raise ConfigError(f"${LIMIT}: expected gigabytes from 0 on, such as 10, came {text!r}")
    return gigabytes * 1e9
