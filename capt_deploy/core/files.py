"""Reading, and writing atomically: a file or folder is complete or absent."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from capt_deploy.core.errors import CaptError, ConfigError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LFS = b"version https://git-lfs.github.com/spec/"


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename is not stored before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders
        _sync(path)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name what was being written in the errors of a full or broken disk, which name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _DISK_ERRORS:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: `value` contains NaN or infinity, which JSON lacks.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path, error: type[CaptError]) -> Any:
    """Return the content of a JSON file.

    Raises:
        error: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise error(f"{path}: expected a readable JSON file ({cause})") from cause


def refuse_existing(path: Path, error: type[CaptError]) -> None:
    """Raise an error, before time is spent, if nothing new can be written to `path`.

    Raises:
        error: `path` exists, or its folder cannot be written to.
    """
    if path.exists():
        raise error(f"{path}: already exists; remove it or choose another name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise error(f"{path}: expected a writable folder {parent}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    Raises:
        FileExistsError: `path` exists; nothing is overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    with naming(path):
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            _sync_folder(temporary)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Return `$CAPT_CACHE`, else `capt` in the user's cache folder, else a temporary folder.

    Raises:
        ConfigError: other users can access the temporary folder.
    """
    if chosen := os.environ.get("CAPT_CACHE"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "capt"
    try:
        return Path.home() / ".cache" / "capt"
    except RuntimeError:  # a user without a home, as in many containers
        return _temporary_folder()


def _temporary_folder() -> Path:
    """Return a temporary folder that other users of the machine can neither read nor change."""
    if os.name != "posix":  # elsewhere each user has a separate temporary folder
        return Path(tempfile.gettempdir()) / "capt"
    path = Path(tempfile.gettempdir()) / f"capt-{os.geteuid()}"
    with suppress(OSError):  # it exists; or nothing can be written, which the first write reports
        path.mkdir(mode=0o700)
    try:
        status = path.lstat()
    except OSError:
        return path
    open_to_others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or open_to_others:
        raise ConfigError(
            f"{path}: expected a folder that only this user can access, came "
            f"{stat.filemode(status.st_mode)} of user {status.st_uid}; remove it, or set "
            "$CAPT_CACHE to a folder of your own"
        )
    return path


def expand_home(path: str | Path) -> Path:
    """Return `path` with a leading `~` replaced by the home folder, unless a file is named so."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: the name of a file, such as ~x.jpg
        return Path(path)


def visible_files(folder: Path) -> list[Path]:
    """Return every file below `folder`, sorted, without files and folders hidden by a dot."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer: a few lines that stand for the real content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def is_inside(name: str) -> bool:
    """Return whether a relative name stays inside its folder (no `..`, no root, no drive)."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or "\0" in name:
        return False
    return not (".." in parts or parts[0].startswith("/") or parts[0][1:2] == ":")
