"""Files of sentences: by class, as the CAPT authors publish them, and by pair (METHOD 3)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import read_json, write_json
from capt_train.confusion.sentences import (
    Pair,
    PairSentences,
    Sentences,
    clean,
    list_names,
    pair_key,
    plain_name,
)
from capt_train.parts import SENTENCE_KINDS

_PAIR_FORM = '{"a|b": {"commonality": ["…"], "difference": ["…"]}} (--sentences)'
_CLASS_FORM = '{"class": ["sentence", "…"]} (--commonality, --difference)'
_MAX_MIB = 64
_JSON_TYPES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_class_file(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read `{class: [sentence, …]}`, the form the CAPT authors publish.

    Args:
        path: the JSON file.
        class_names: of the data set; case, underscores, hyphens and runs of blanks don't matter.

    Returns:
        Sentences by class. A name that is no class keeps its own spelling, and an empty list
        stays one, so that `sentences.Gathered.coverage` can report them.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    lookup = _lookup(class_names)
    found: dict[str, tuple[str, ...]] = {}
    for key, texts in _read_object(path, _CLASS_FORM).items():
        name = _name(key, lookup)
        found[name] = clean([*found.get(name, ()), *_texts(texts, path, key, _CLASS_FORM)])
    return found


def read_pair_file(path: Path, class_names: Sequence[str]) -> dict[Pair, PairSentences]:
    """Read `{"a|b": {"commonality": [sentence, …], "difference": […]}}`, in any order of a and b.

    Args:
        path: the JSON file.
        class_names: matched as by `read_class_file`.

    Returns:
        Sentences by pair; names that are no class and empty lists are kept as there.

    Raises:
        DataError: the file cannot be read or has another form.
    """
    lookup = _lookup(class_names)
    found: dict[Pair, PairSentences] = {}
    for key, kinds in _read_object(path, _PAIR_FORM).items():
        if not isinstance(kinds, dict) or not set(kinds) <= set(SENTENCE_KINDS):
            raise _wrong_form(path, key, kinds, _PAIR_FORM)
        # Names may hold a | themselves: the split that gives two classes, else the first one.
        splits = [(key[: bar.start()], key[bar.end() :]) for bar in re.finditer(r"\|", key)]
        names = [(_name(a, lookup), _name(b, lookup)) for a, b in splits]
        a, b = next((ab for ab in names if {*ab} <= {*class_names}), (names or [("", "")])[0])
        if not a or not b or a == b:
            raise DataError(f"{path}: expected two classes, as in {_PAIR_FORM}, came {key!r}")
        old = found.get(pair_key(a, b), PairSentences())
        texts = {
            kind: _texts(kinds.get(kind, []), path, key, _PAIR_FORM) for kind in SENTENCE_KINDS
        }
        merged = (clean([*old.of(kind), *texts[kind]]) for kind in SENTENCE_KINDS)
        found[pair_key(a, b)] = PairSentences(*merged)
    return found


def write_pair_file(path: Path, sentences: Sentences) -> None:
    """Write, atomically, what `read_pair_file` reads."""
    content = {
        "|".join(p): {k: list(texts.of(k)) for k in SENTENCE_KINDS}
        for p, texts in sentences.items()
    }
    write_json(path, content)


def _lookup(class_names: Sequence[str]) -> dict[str, str]:
    """Return classes by plain name; two that share one (`t-shirt`, `t_shirt`) need their own."""
    shared = Counter(map(plain_name, class_names))
    plain = {plain_name(name): name for name in class_names if shared[plain_name(name)] == 1}
    return plain | {name: name for name in class_names}


def _name(text: str, lookup: Mapping[str, str]) -> str:
    """Return the class that is meant, else the text itself."""
    return lookup.get(text) or lookup.get(plain_name(text)) or " ".join(clean([text]))


def _read_object(path: Path, form: str) -> dict[str, Any]:
    try:
        if path.is_file() and path.stat().st_size > _MAX_MIB * 2**20:
            raise DataError(f"{path}: expected at most {_MAX_MIB} MiB, came more")
        content = read_json(path, DataError)
    except DataError as error:
        raise DataError(f"{error}; expected {form}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, numbers of endless digits
        raise DataError(f"{path}: expected {form}, came JSON that cannot be read") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {form}, came {_describe(content)}")
    return content


def _texts(value: Any, path: Path, key: str, form: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _wrong_form(path, key, value, form)
    return value


def _wrong_form(path: Path, key: str, value: Any, form: str) -> DataError:
    other = {_PAIR_FORM: (list, _CLASS_FORM), _CLASS_FORM: (dict, _PAIR_FORM)}[form]
    fix = f"is the file of the form {other[1]}?" if isinstance(value, other[0]) else "correct it"
    return DataError(f"{path}: expected {form}, came {key!r} with {_describe(value)}; {fix}")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {list_names([repr(key) for key in value]) or 'no keys'}"
    if isinstance(value, list):
        strange = next((type(item) for item in value if not isinstance(item, str)), None)
        return f"a list with {_JSON_TYPES[strange]}" if strange else "a list of texts"
    return _JSON_TYPES[type(value)]
