"""Engines on disk, so that a machine builds each of them once.

An entry is one file, written atomically: a magic word, the length of a JSON header, the header
(format, key, size and SHA-256 of the body), the body. It is checked whole whenever it is read, and
whatever is wrong with it, it is built again: losing the cache costs time, never a result.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from capt_deploy.backends.tensorrt.entry import DamagedError, EngineKey, encode, read_body, read_key
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError, ConfigError
from capt_deploy.core.file_lock import file_lock, file_lock_if_free
from capt_deploy.core.files import cache_folder, write_bytes

T = TypeVar("T")

LIMIT = "CAPT_ENGINE_CACHE_GB"  # in the environment
_GIGABYTES = 10.0
_ENTRY, _LOCK = ".entry", ".lock"


@dataclass(frozen=True)
class Entry:
    """One file of the cache as its header describes it; the body is not checked."""

    path: Path
    bytes: int
    used: float  # seconds since 1970
    key: dict[str, Any] | None  # None: it is damaged


@dataclass(frozen=True)
class Pruned:
    """What was removed."""

    entries: int
    bytes: int


class EngineCache:
    """A folder of entries. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        """Choose a folder; it is made when something is written.

        Raises:
            ConfigError: the environment sets a limit that is no size; or see `cache_folder`.
        """
        self.folder = folder or cache_folder() / "engines"
        self._limit = _limit()

    def obtain(
        self, key: EngineKey, build: Callable[[], bytes], load: Callable[[bytes], T | None]
    ) -> T:
        """Return what `load` makes of an entry, which is built if there is none that it takes.

        Processes and threads that want the same entry at once build it once.

        Raises:
            BackendError: `load` returns None for what was just built.
            Exception: whatever `build` raises; then nothing is kept.
        """
        if (loaded := self._load(key, load)) is not None:
            return loaded
        with self._locked(key):
            # Somebody else may have built it while this process waited.
            if (loaded := self._load(key, load)) is not None:
                return loaded
            data = build()
            if (loaded := load(data)) is None:
                raise BackendError(f"{key.library}: the engine just built does not load here")
            self.write(key, data)
        return loaded

    def read(self, key: EngineKey) -> bytes | None:
        """Return a body; None if there is no such entry, or it is not as it was written."""
        path = self.path_of(key)
        try:
            body = read_body(path, key)
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as cause:
            say(f"engine cache: {path} cannot be used ({cause})")
            return None
        with suppress(OSError):  # somebody else's file, for example
            os.utime(path)  # the least recently used are pruned first
        return body

    def write(self, key: EngineKey, body: bytes) -> None:
        """Keep a body; where that is impossible, say so and do without."""
        path = self.path_of(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _clear_way(path)
            write_bytes(path, encode(key, body))
            self.prune(keep=path)
        except OSError as cause:
            say(f"engine cache: {path} cannot be written ({cause}); doing without")

    def entries(self) -> list[Entry]:
        """Return what the cache holds, the most recently used first."""
        found = []
        for path in self.folder.glob(f"*{_ENTRY}"):
            with suppress(OSError):  # removed meanwhile
                status = path.stat()
                try:
                    key = read_key(path)
                except DamagedError:
                    key = None
                found.append(Entry(path, status.st_size, status.st_mtime, key))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def prune(self, keep: Path | None = None) -> Pruned:
        """Remove damaged entries, what killed builds left, and the least recently used.

        Args:
            keep: an entry that stays, however large it is.
        """
        total = entries = freed = 0
        for entry in self.entries():
            total += entry.bytes
            if entry.path == keep or (entry.key is not None and total <= self._limit):
                continue
            total -= entry.bytes
            with suppress(OSError):  # Windows does not remove what somebody reads
                _clear_way(entry.path, files=True)
                entries, freed = entries + 1, freed + entry.bytes
        self._remove_leftovers()
        return Pruned(entries, freed)

    def path_of(self, key: EngineKey) -> Path:
        """Return where an entry lies."""
        return self.folder / f"{key.name}{_ENTRY}"

    def _load(self, key: EngineKey, load: Callable[[bytes], T | None]) -> T | None:
        body = self.read(key)
        loaded = None if body is None else load(body)
        if body is not None and loaded is None:
            say(f"engine cache: {self.path_of(key)} does not load here")
        return loaded

    @contextmanager
    def _locked(self, key: EngineKey) -> Iterator[None]:
        """Keep others from building the same entry; where that is impossible, go on without."""
        lock = file_lock(
            self.folder / f"{key.name}{_LOCK}",
            waiting=lambda: say("engine cache: another process builds this engine; waiting for it"),
        )
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock)
            except OSError as cause:
                say(f"engine cache: {self.folder} cannot be used ({cause}); building without it")
            yield

    def _remove_leftovers(self) -> None:
        """Remove locks without an entry, and halves of entries that nobody is writing any more."""
        names = {path.name.split(".")[1] for path in self.folder.glob(f".*{_ENTRY}.*.tmp")}
        names |= {path.stem for path in self.folder.glob(f"*{_LOCK}")}
        for name in names:
            lock = self.folder / f"{name}{_LOCK}"
            with suppress(OSError), file_lock_if_free(lock) as free:
                if free:
                    for half in self.folder.glob(f".{name}{_ENTRY}.*.tmp"):
                        half.unlink(missing_ok=True)
                    if not (self.folder / f"{name}{_ENTRY}").exists():
                        lock.unlink(missing_ok=True)


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


def _clear_way(path: Path, files: bool = False) -> None:
    """Remove a folder that lies where an entry belongs, and with `files` whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif files:
        path.unlink()
