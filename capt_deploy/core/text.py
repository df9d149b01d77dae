"""Shorten and clean text for display."""

import unicodedata

_UNPRINTABLE = ("Cc", "Cs")  # categories: control characters, halves of a character


def shortened(name: str, longest: int) -> str:
    """Return a name on one line, cut in the middle because its ends tell classes apart."""
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[1 - longest // 2 :]}"


def escaped(name: str) -> str:
    """Return a file name in which each byte that is not UTF-8 is an escape, such as `\\udce9`."""
    return name.encode("utf-8", "backslashreplace").decode()


def composed(text: str) -> str:
    """Return text in the composed form of Unicode (NFC), as most systems write it; macOS does not.

    "é" can be one character or two, which look alike and have other tokens.
    """
    return unicodedata.normalize("NFC", text)


def printable(text: str) -> str:
    """Return text on one line, without characters that XML cannot hold."""
    return "".join(map(_printable_char, text))


def _printable_char(char: str) -> str:
    if char.isspace():
        return " "
    bad = unicodedata.category(char) in _UNPRINTABLE or char in "\ufffe\uffff"
    return "\N{REPLACEMENT CHARACTER}" if bad else char
