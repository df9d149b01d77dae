"""Reading, and writing atomically: a file or folder is complete or absent."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import IO, Any

from capt_deploy.core.errors import CaptError, ConfigError

_IN_USE = "in_use"  # name of a lock; processes that are killed hold none
_BLOCK = 2**20  # bytes that are hashed at once
_LARGEST_TEXT = 2**28  # bytes; a million listed images are less
_DEEPEST_JSON = 100  # lists and objects in each other; what reads them may recurse
_NESTING = (dict, list)
_INTEGERS = range(-(2**63), 2**64)  # that fit into 64 bits, as arrays and files need them
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
LFS_START = b"version https://git-lfs.github.com/spec/"


class TooLargeError(OSError):
    """A file has more bytes than it may have."""


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
    # a file name that is not UTF-8 becomes a JSON escape, from which Python reads it back
    write_bytes(path, text.encode("utf-8", "backslashreplace") + b"\n")


def read_json(path: Path, error: type[CaptError]) -> Any:
    """Return the content of a JSON file, in an encoding that `decoded` knows.

    Raises:
        error: the file is missing, unreadable or too large; or as `parse_json`.
    """
    try:
        return _value_of(read_file(path, _LARGEST_TEXT))
    except (OSError, ValueError) as cause:
        raise error(f"{path}: expected a readable JSON file ({cause})") from cause


def parse_json(text: str | bytes, where: str, error: type[CaptError]) -> Any:
    """Return the value of JSON text, or of bytes in an encoding that `decoded` knows.

    Args:
        text: the JSON text.
        where: named in errors.
        error: raised for whatever the text may hold.

    Raises:
        error: it is no JSON; or it holds NaN, infinity, an integer of more than 64 bits, or lists
            and objects more than 100 deep.
    """
    try:
        return _value_of(text)
    except ValueError as cause:
        raise error(f"{where}: not JSON ({cause})") from cause


def _value_of(text: str | bytes) -> Any:
    """Return the value of JSON text; raises ValueError where `parse_json` raises its error."""
    if isinstance(text, bytes):
        text = decoded(text)
    too_deep = f"lists and objects are more than {_DEEPEST_JSON} deep"
    try:
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite_float, parse_int=_short_integer
        )
    except RecursionError as cause:
        raise ValueError(too_deep) from cause
    level = [value]
    for _ in range(_DEEPEST_JSON):
        level = [inner for outer in level for inner in _parts(outer) if isinstance(inner, _NESTING)]
        if not level:
            return value
    raise ValueError(too_deep)


def _refuse(text: str) -> Any:
    shown = text if len(text) < 30 else f"{text[:20]}… of {len(text)} characters"
    raise ValueError(f"the number {shown} cannot be used")


def _finite_float(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _refuse(text)


def _short_integer(text: str) -> int:
    # Python refuses to convert some thousands of digits, which would take it very long.
    return number if len(text) <= 20 and (number := int(text)) in _INTEGERS else _refuse(text)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def safetensors_metadata(data: bytes, where: str, error: type[CaptError]) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, which the library reads by path only.

    Raises:
        error: the header is no JSON.
        KeyError, TypeError: it has no texts.
    """
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], where, error)
    texts: dict[str, str] = header["__metadata__"]
    return texts


def decoded(data: bytes) -> str:
    """Return text in UTF-8; or in UTF-16, as PowerShell writes it, where a byte-order mark says so.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    utf_16 = data.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")


def read_text(path: Path) -> str:
    """Return the content of a text file of at most 256 MiB, as `decoded`.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, is too large, no regular file or no text.
    """
    return decoded(read_file(path, _LARGEST_TEXT))


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened; or it is a pipe or a device, which reading may never end.
    """
    return open(path, "rb", opener=_open_regular)


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        TooLargeError: it has more.
        OSError: it cannot be read, or is no regular file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise TooLargeError(f"expected at most {limit:,} bytes, came {size:,}")
        return file.read(size)


def _open_regular(path: str, flags: int) -> int:
    # without waiting for somebody to write into a pipe
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"expected a regular file, came {stat.filemode(mode)}")


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

    What a killed process left of such a folder is removed.

    Raises:
        FileExistsError: `path` exists; nothing is overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    with naming(path), _workplace(path) as work:
        folder = work / "new"
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync_folder(folder)
        folder.rename(path)
    _sync_folder(path.parent)


@contextmanager
def new_zip(path: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files become the zip `path` when the block ends well.

    The files are stored as they are: weights do not get smaller.

    Raises:
        FileExistsError: `path` exists; nothing is overwritten.
    """
    with naming(path), _workplace(path) as work:
        folder = work / "new"
        folder.mkdir()
        yield folder
        packed = work / "packed"
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        _sync(packed)
        if path.exists():
            raise FileExistsError(f"{path} already exists")
        packed.rename(path)
    _sync_folder(path.parent)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and remove it and those of killed processes."""
    from filelock import FileLock, Timeout  # takes longer than all of this module

    no_lock = OSError, NotImplementedError  # a disk without locks
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for other in [*path.parent.iterdir()]:
        if pattern.fullmatch(other.name) and (other / _IN_USE).is_file():
            with suppress(*no_lock, Timeout), FileLock(other / _IN_USE, blocking=False):
                shutil.rmtree(other, ignore_errors=True)
    work = _temporary_sibling(path)
    work.mkdir()
    in_use = FileLock(work / _IN_USE)
    try:
        with suppress(*no_lock):
            in_use.acquire(blocking=False)
        yield work
    finally:
        in_use.release()
        shutil.rmtree(work, ignore_errors=True)


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


def is_file(path: Path) -> bool:
    """Tell whether a path is that of a file; one that the system refuses, as too long, is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):  # hashlib.file_digest needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer: a few lines that stand for the real content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_START)) == LFS_START


def is_inside(name: str) -> bool:
    """Return whether a relative name stays inside its folder (no `..`, no root, no drive)."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or "\0" in name:
        return False
    return not (".." in parts or parts[0].startswith("/") or parts[0][1:2] == ":")
