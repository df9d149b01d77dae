"""Settings as dataclass fields: default, help and allowed values are declared together."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from capt_deploy.core.errors import ConfigError

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOOLEANS = {"true": True, "false": False}
CLIP_TEMPLATES = "openai"  # stands for the templates that CLIP's authors used on ImageNet
_CLOSE = 0.6  # similarity from which on a name is suggested


@dataclass(frozen=True)
class Allowed:
    """The values that a setting takes, in words and as a test."""

    expected: str
    fits: Callable[[Any], bool]


def at_least(least: int) -> Allowed:
    """Allow finite numbers from `least` on."""
    return Allowed(f"{least} or more", lambda value: least <= value < math.inf)


def one_of(choices: Iterable[str]) -> Allowed:
    """Allow some words."""
    known = tuple(choices)
    return Allowed(f"one of {', '.join(known)}", lambda value: value in known)


ABOVE_0 = Allowed("a finite number above 0", lambda value: 0 < value < math.inf)
SHARE = Allowed("0 to 1", lambda value: 0 <= value <= 1)
ANYTHING = Allowed("", lambda value: True)


@dataclass(frozen=True)
class Setting:
    """A setting as the command line, error messages and documentation name it."""

    name: str  # with its group: tuning.epochs
    type: Any
    default: Any
    help: str
    allowed: Allowed = ANYTHING
    none: str | None = None  # how None is spelled on the command line, where it is a value
    option: str | None = None  # the option of capt-train that is named like the setting

    @property
    def default_text(self) -> str:
        """Return the default as the command line spells it."""
        if self.default is None:
            return self.none or ""
        if isinstance(self.default, tuple):
            return ", ".join(self.default)
        return f"{self.default}".lower() if self.type is bool else f"{self.default}"

    @property
    def type_name(self) -> str:
        """Return the type in words."""
        plain = "texts" if self.type is tuple else _TYPE_NAMES[self.type]
        return plain if self.none is None else f"{plain} or {self.none}"

    def parse(self, text: str) -> Any:
        """Read a value from the command line.

        Raises:
            ConfigError: it is of another type, or the setting holds several values.
        """
        if text == self.none:
            return None
        if self.type is tuple:
            raise ConfigError(f"--set {self.name}: give {self.option} instead")
        try:
            return _BOOLEANS[text.lower()] if self.type is bool else self.type(text)
        except (KeyError, ValueError) as cause:
            raise self.error(self.type_name, text) from cause

    def check(self, value: Any) -> None:
        """Raise a ConfigError where the value is of another type or out of range."""
        if value is None and self.none is not None:
            return
        accepted = (int, float) if self.type is float else self.type
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.type is not bool):
            raise self.error(self.type_name, value)
        if isinstance(value, tuple) and not all(isinstance(text, str) for text in value):
            raise self.error(self.type_name, value)
        if not self.allowed.fits(value):
            word = "" if self.none is None else f"{self.none} or "
            raise self.error(word + self.allowed.expected, value)

    def error(self, expected: str, value: Any) -> ConfigError:
        """Return an error that names the expected and the given value."""
        return ConfigError(f"{self.label}: expected {expected}, came {value!r}")

    @property
    def label(self) -> str:
        """Return the name of the setting on the command line."""
        if self.option is None:
            return f"--set {self.name}"
        both = "." in self.name and self.type is not tuple
        return f"{self.option} (--set {self.name})" if both else self.option


def setting(
    default: Any,
    help: str,
    allowed: Allowed = ANYTHING,
    none: str = "none",
    option: str | None = None,
) -> Any:
    """Declare a dataclass field that is a setting; `none` spells None where that is a value."""
    metadata = {"help": help, "allowed": allowed, "none": none, "option": option}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SettingsGroup:
    """Base of dataclasses whose fields are settings; values are checked when it is made."""

    group: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.group = group

    def __post_init__(self) -> None:
        for name, declared in self.declared().items():
            declared.check(getattr(self, name))

    @classmethod
    def declared(cls) -> dict[str, Setting]:
        """Return the settings of the group by the names of its fields."""
        types, prefix = get_type_hints(cls), f"{cls.group}." if cls.group else ""
        declared = {}
        for entry in fields(cls):
            if not entry.metadata:  # a group of settings
                continue
            hint = types[entry.name]
            optional = NoneType in get_args(hint)
            kind = get_args(hint)[0] if optional else get_origin(hint) or hint
            metadata = {**entry.metadata, "none": entry.metadata["none"] if optional else None}
            declared[entry.name] = Setting(prefix + entry.name, kind, entry.default, **metadata)
        return declared


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint to the known name, with or without its group, that is most like a misspelt one.

    Where none is alike, the hint says where the names are listed.
    """

    def similarity(candidate: str) -> float:
        spellings = (candidate, candidate.rpartition(".")[2])
        return max(SequenceMatcher(None, name, spelling).ratio() for spelling in spellings)

    best = max(known, key=similarity)
    alike = similarity(best) >= _CLOSE
    return f"did you mean {best}?" if alike else "see capt-train --help and docs/training.md"
