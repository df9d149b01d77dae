"""Names of classes: prompts read "aquarium fish" where folders say `aquarium_fish`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import read_json
from capt_deploy.core.text import composed, escaped
from capt_deploy.data import label_files


def name_classes(
    root: Path, labels: tuple[str, ...], names_file: str | Path | None, strict_names: bool
) -> tuple[str, ...]:
    """Return a name for each label: that in the file, else the label with spaces for underscores.

    Raises:
        DataError: two classes share a name, a name is empty, or the file cannot be used.
    """
    renamed = {}
    if names_file is not None:
        renamed = _read_names(Path(names_file), labels, strict_names)
    names = tuple(renamed.get(label) or _tidy(label.replace("_", " ")) for label in labels)
    if unprintable := [name for name in names if escaped(name) != name]:
        raise DataError(f"{root}: class names {unprintable} are no text in UTF-8; rename them")
    if "" in names:
        label = labels[names.index("")]
        raise DataError(f"{root}: class {label!r} has an empty name; give it one")
    folded = [name.casefold() for name in names]
    name, times = Counter(folded).most_common(1)[0]
    if times > 1:
        twins = [label for label, other in zip(labels, folded, strict=True) if other == name]
        raise DataError(
            f"{root}: classes {twins} have the same name {name!r}; "
            f"merge them or name them apart with --class-names"
        )
    return names


def distinct_names(names: Iterable[str], taken: Sequence[str] = ()) -> tuple[str, ...]:
    """Return class names in their order, with single spaces in them.

    Args:
        names: the new names.
        taken: names of existing classes.

    Raises:
        ConfigError: not a list of texts, an empty name, or two names that differ only in spelling,
            such as "Cat" and "cat": prompts hardly tell these apart.
    """
    listed = None if isinstance(names, str) else list(names)
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"class names: expected a list of texts, came {names!r}")
    distinct = [_tidy(name) for name in listed]
    if "" in distinct:
        raise ConfigError(f"class names: the name at place {distinct.index('') + 1} is empty")
    known = {plain_spelling(name): name for name in taken}
    for name in distinct:
        if (twin := known.get(plain_spelling(name))) is not None:
            raise ConfigError(
                f"class names: {name!r} is there already, as {twin!r}; name each class once"
            )
        known[plain_spelling(name)] = name
    return tuple(distinct)


def plain_spelling(name: str) -> str:
    """Return a name for comparison: in lower case, with single spaces and no underscores."""
    return _tidy(name.replace("_", " ")).casefold()


def _tidy(name: str) -> str:
    return " ".join(composed(name).split())


def _read_names(path: Path, labels: tuple[str, ...], strict: bool) -> dict[str, str]:
    if path.suffix.lower() == ".csv":
        pairs = label_files.read_pairs(path)
    else:
        pairs = read_json(path, DataError)
        texts = isinstance(pairs, dict) and all(isinstance(name, str) for name in pairs.values())
        if not texts:
            raise DataError(f'{path}: expected a JSON object such as {{"aquarium_fish": "fish"}}')
    names = {}
    for listed, name in pairs.items():
        label = composed(listed)
        if label not in labels and strict:
            near = get_close_matches(label, labels, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{path}: {label!r} is no class of the data set{hint}")
        if not name.strip():
            raise DataError(f"{path}: the name of {label!r} is empty")
        names[label] = _tidy(name)
    return names
