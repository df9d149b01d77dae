"""Read the manifest that an ONNX file carries, without a library and without the weights.

An ONNX file is a protobuf message. Its properties are pairs of strings in field 14 of the top
level, beside the graph in field 7, which is skipped over whole.
"""

from collections.abc import Iterator

from capt_deploy.bundle.manifest import METADATA_KEY

_PROPERTIES = 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def read_metadata(onnx: bytes, key: str = METADATA_KEY) -> str | None:
    """Return a property, by default the manifest as JSON text; None if there is none."""
    view = memoryview(onnx)
    try:
        for field, content in _fields(view):
            if field == _PROPERTIES:
                entry = dict(_fields(content))
                if bytes(entry.get(1, b"")) == key.encode():
                    return bytes(entry.get(2, b"")).decode()
    except (IndexError, ValueError):
        return None
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of the length-delimited fields of a message.

    Raises:
        IndexError, ValueError: it is no protobuf message, or a truncated one.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(message, position)
            if position + size > len(message):
                raise ValueError("truncated")
            yield tag >> 3, message[position : position + size]
            position += size
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
