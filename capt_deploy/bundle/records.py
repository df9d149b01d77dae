"""Read dataclasses from JSON: keys, types and defaults are those of their fields."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from capt_deploy.core.errors import BundleError, CaptError

T = TypeVar("T")
_JSON_TYPES: Mapping[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (float, int),
}


def read_record(kind: type[T], values: Any, where: str) -> T:
    """Build the dataclass `kind` from a JSON object.

    Args:
        kind: a dataclass whose fields are texts, numbers, tuples, mappings from text, other
            dataclasses, or one of these or None.
        values: the JSON object.
        where: named in error messages.

    Raises:
        BundleError: a key is unknown or missing, or a value has the wrong type or is refused by
            `kind` itself.
    """
    if not isinstance(values, dict):
        raise BundleError(f"{where}: expected a JSON object, came {values!r}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(values) - set(known):
        raise BundleError(f"{where}: unknown keys {sorted(unknown)}; upgrade capt to read it")
    required = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    if missing := required - set(values):
        raise BundleError(f"{where}: missing keys {sorted(missing)}")
    types = get_type_hints(kind)
    arguments = {
        name: _read_value(types[name], value, f"{where}, {name}") for name, value in values.items()
    }
    try:
        return kind(**arguments)
    except (ValueError, CaptError) as cause:
        raise BundleError(f"{where}: {cause}") from cause


def _read_value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return read_record(kind, value, where)  # type: ignore[arg-type]
    if kind is Any or type(value) in _JSON_TYPES.get(kind, ()):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_union(arguments, value, where)
    if origin is Mapping and isinstance(value, dict):
        return {
            key: _read_value(arguments[1], item, f"{where}, {key}") for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else [*arguments]
        if len(kinds) == len(value):
            return tuple(
                _read_value(item_kind, item, where)
                for item_kind, item in zip(kinds, value, strict=True)
            )
    raise _wrong_type(kind, value, where)


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if len(kinds) == 1:
        return _read_value(kinds[0], value, where)
    for kind in kinds:
        with suppress(BundleError):
            return _read_value(kind, value, where)
    raise _wrong_type(" or ".join(kind.__name__ for kind in kinds), value, where)


def _wrong_type(kind: Any, value: Any, where: str) -> BundleError:
    names = {tuple: "a list", Mapping: "a JSON object"}
    name = names.get(get_origin(kind)) or getattr(kind, "__name__", kind)
    return BundleError(f"{where}: expected {name}, came {value!r}")
