"""ONNX graphs, and what each says of itself: metadata, shapes and its own hash.

A graph is a protobuf message. It is read here without the onnx package, which the runtime does not
need, and its nodes and weights are skipped.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from capt_deploy.bundle.manifest import METADATA_KEY

HASH_KEY = "capt_sha256"  # metadata key of the hash of all bytes before it, at the end of the file
HASHED_KEY = "capt_hashed"  # metadata key that says that the file ends with its hash
_PROPERTIES, _GRAPH = 14, 7  # field numbers of `metadata_props` and `graph` in ONNX's ModelProto
_INPUT, _OUTPUT = 11, 12  # in GraphProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_LONGEST_VARINT = 10  # bytes
_DIGITS = 64  # of a SHA-256
_ENTRY = (
    bytes([1 << 3 | _BYTES, len(HASH_KEY)]) + HASH_KEY.encode() + bytes([2 << 3 | _BYTES, _DIGITS])
)
_PREFIX = bytes([_PROPERTIES << 3 | _BYTES, len(_ENTRY) + _DIGITS]) + _ENTRY

Shape = tuple[int | None, ...]  # None for axes of any size


@dataclass(frozen=True)
class StoredGraph:
    """One ONNX graph, ready for a backend."""

    onnx: bytes
    precision: str
    weights_folder: Path | None = None  # of weights that are not in the graph's own file
    owner: object = field(default=None, compare=False)  # whose end removes that folder


def read_metadata(onnx: bytes, key: str = METADATA_KEY) -> str | None:
    """Return a metadata property of an ONNX file, by default its manifest as JSON text.

    Returns:
        The value of `key`; None if there is none, or if the file is no ONNX file.
    """
    try:
        for entry in _messages(memoryview(onnx), _PROPERTIES):
            name, value = (b"".join(_messages(entry, number)) for number in (1, 2))
            if name == key.encode():
                return value.decode()
    except (IndexError, ValueError):
        pass
    return None


def read_shapes(onnx: bytes) -> dict[str, Shape]:
    """Return the shapes of the inputs and outputs by name, of those that have one.

    The result is empty if the file is no ONNX file.
    """
    shapes: dict[str, Shape] = {}
    try:
        for graph in _messages(memoryview(onnx), _GRAPH):
            for value in (*_messages(graph, _INPUT), *_messages(graph, _OUTPUT)):
                name = b"".join(_messages(value, 1)).decode()
                for kind in _messages(value, 2):  # TypeProto, its tensor type, the shape of that
                    for shape in (s for tensor in _messages(kind, 1) for s in _messages(tensor, 2)):
                        shapes[name] = tuple(map(_size, _messages(shape, 1)))
    except (IndexError, ValueError):
        return {}
    return shapes


def with_hash(onnx: bytes) -> bytes:
    """Return an ONNX file with its own hash, as a last metadata property.

    A protobuf message may be continued by appending fields, so that nothing else changes. Its
    metadata must have HASHED_KEY already.
    """
    return onnx + _PREFIX + hashlib.sha256(onnx).hexdigest().encode()


def has_changed(onnx: bytes) -> bool:
    """Return whether an ONNX file differs from what was exported, by the hash at its end.

    Graphs of exports without a hash are never found to have changed.
    """
    start = len(onnx) - len(_PREFIX) - _DIGITS
    if onnx[max(start, 0) :].startswith(_PREFIX):
        digest = hashlib.sha256(memoryview(onnx)[:start]).hexdigest()
        return onnx[-_DIGITS:] != digest.encode()
    return read_metadata(onnx, HASHED_KEY) is not None or read_metadata(onnx, HASH_KEY) is not None


def _size(dimension: memoryview) -> int | None:
    sizes = [content for number, content in _fields(dimension) if number == 1]
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the contents of one field: messages, texts or bytes."""
    for found, content in _fields(message):
        if found == number and isinstance(content, memoryview):
            yield content


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and content of each field; numbers of fixed size are left out.

    Raises:
        IndexError, ValueError: it is no protobuf message, or a truncated one.
    """
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("no field has the number 0")
        if kind == _VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = _read_varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if position + size > len(message):
            raise ValueError("truncated")
        if kind == _BYTES:
            yield number, message[position : position + size]
        position += size


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, lowest first, and the position behind it."""
    value = 0
    for place in range(_LONGEST_VARINT):
        byte = message[position + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, position + place + 1
    raise ValueError("a number without an end")
