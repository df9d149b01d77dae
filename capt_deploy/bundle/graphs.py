"""ONNX graphs, and the metadata that each carries inside."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capt_deploy.bundle.manifest import METADATA_KEY

_PROPERTIES = 14  # field number of `metadata_props` in ONNX's ModelProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


@dataclass(frozen=True)
class StoredGraph:
    """One ONNX graph, ready for a backend."""

    onnx: bytes
    precision: str
    weights_folder: Path | None = None  # of weights that are not in the graph's own file


def read_metadata(onnx: bytes, key: str = METADATA_KEY) -> str | None:
    """Return a metadata property of an ONNX file, by default its manifest as JSON text.

    The file is a protobuf message. It is read here without the onnx package, which the runtime
    does not need, and the graph with its weights is skipped.

    Returns:
        The value of `key`; None if there is none, or if the file is no ONNX file.
    """
    try:
        for field, content in _read_fields(memoryview(onnx)):
            if field == _PROPERTIES:
                entry = dict(_read_fields(content))  # StringStringEntryProto: 1 key, 2 value
                if bytes(entry.get(1, b"")) == key.encode():
                    return bytes(entry.get(2, b"")).decode()
    except (IndexError, ValueError):
        pass
    return None


def _read_fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of the length-delimited fields of a protobuf message.

    Raises:
        IndexError, ValueError: it is no protobuf message, or a truncated one.
    """
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _read_varint(message, position)
            if position + size > len(message):
                raise ValueError("truncated")
            yield tag >> 3, message[position : position + size]
            position += size
        elif kind == _VARINT:
            _, position = _read_varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
