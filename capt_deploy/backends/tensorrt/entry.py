"""What an engine is for, and the file that keeps it; see `engine_cache` for its layout."""

import hashlib
import json
import os
import stat
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

_FORMAT = 1
_MAGIC = b"capteng\n"
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 2**16  # bytes


class DamagedError(Exception):
    """A file that is not as it was written."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that makes one engine differ from another."""

    library: str  # tensorrt, tensorrt_rtx
    version: str  # of the library
    platform: str  # such as linux-x86_64
    sm: int  # compute capability, 89 for 8.9
    gpu: str = ""  # its name, where the engine is for it alone
    driver: str = ""  # likewise
    onnx: str = ""  # SHA-256 of the graph
    weights: str = ""  # SHA-256 of the weights in other files, if there are some
    precision: str = ""
    batches: tuple[int, ...] = ()  # smallest, usual, largest
    kind: str = "engine"  # or what the library keeps beside it: timing, runtime

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON reads it back."""
        return {**asdict(self), "batches": list(self.batches)}

    @property
    def name(self) -> str:
        """What its entry is called."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def encode(key: EngineKey, body: bytes) -> bytes:
    """Return the content of an entry."""
    header = json.dumps(
        {
            "format": _FORMAT,
            "key": key.to_json(),
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    ).encode()
    return b"".join((_MAGIC, _LENGTH.pack(len(header)), header, body))


def read_body(path: Path, key: EngineKey) -> bytes:
    """Return the body of an entry.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        DamagedError: it is not the entry of this key, not as it was written, or of a user who is
            neither this one nor root: its hash cannot tell who has made it, and engines are code.
    """
    with _open(path) as file:
        if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
            raise DamagedError("it belongs to another user")
        header = _read_header(file)
        if header["key"] != key.to_json():
            raise DamagedError("it is for something else")
        body = file.read(header["bytes"])  # `read()` alone grows its memory step by step
    if hashlib.sha256(body).hexdigest() != header.get("sha256"):
        raise DamagedError("its content was changed")
    return body


def read_key(path: Path) -> dict[str, Any]:
    """Return what an entry says it is for, without reading its body; raises like `read_body`."""
    with _open(path) as file:
        key: dict[str, Any] = _read_header(file)["key"]
        return key


def _open(path: Path) -> IO[bytes]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
        raise DamagedError("it is no file")
    return path.open("rb")


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    """Read a header up to the body, whose size it must have right."""
    start = file.read(len(_MAGIC) + _LENGTH.size)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + _LENGTH.size:
        raise DamagedError("it does not begin as an entry")
    (length,) = _LENGTH.unpack_from(start, len(_MAGIC))
    if length > _LONGEST_HEADER:
        raise DamagedError("its header is too long")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as cause:
        raise DamagedError("its header is no JSON") from cause
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise DamagedError("its format is another one")
    if not isinstance(header.get("key"), dict):
        raise DamagedError("it does not say what it is for")
    size = header.get("bytes")  # 10e2 is equal to 1000, but no number of bytes to read
    if type(size) is not int or size != os.fstat(file.fileno()).st_size - file.tell():
        raise DamagedError("it was cut off")
    return header
