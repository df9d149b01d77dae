"""Shorten and clean text for display."""

import unicodedata

_UNPRINTABLE = ("Cc", "Cs")  # categories: control characters, halves of a character


def shortened(name: str, longest: int) -> str:
    """Return a name on one line, cut in the middle because its ends tell classes apart."""
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[1 - longest // 2 :]}"


def printable(text: str) -> str:
    """Return text on one line, without characters that XML cannot hold."""
    return "".join(map(_printable_char, text))


def _printable_char(char: str) -> str:
    if char.isspace():
        return " "
    bad = unicodedata.category(char) in _UNPRINTABLE or char in "\ufffe\uffff"
    return "\N{REPLACEMENT CHARACTER}" if bad else char
