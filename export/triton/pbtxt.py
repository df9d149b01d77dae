"""Print protobuf's text format, as far as Triton's configurations need it."""

from collections.abc import Mapping
from typing import Any

_PRINTABLE = frozenset(range(32, 127)) - set(b'"\\')


class Word(str):
    """A value without quotes: the name of an enumeration's member."""

    __slots__ = ()


def entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a protobuf map as what it is: repeated pairs of `key` and `value`."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Print a message given as a dictionary of its fields.

    Values are booleans, numbers, strings, `Word`s, dictionaries (messages), or lists of these
    (repeated fields; an empty one prints nothing).
    """
    lines = []
    for field, value in message.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{field} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        # Bytes outside ASCII as octal numbers: no reader takes these for anything else.
        parts = (chr(b) if b in _PRINTABLE else f"\\{b:03o}" for b in value.encode())
        return f'"{"".join(parts)}"'
    return str(value)
