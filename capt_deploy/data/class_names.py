"""What classes are called: prompts read "aquarium fish", folders say `aquarium_fish`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import read_json
from capt_deploy.data import label_files


def name_classes(
    root: Path, labels: tuple[str, ...], names_file: str | Path | None, strict_names: bool
) -> tuple[str, ...]:
    """Return a name for each label: that of the file, else the label with spaces for underscores.

    Raises:
        DataError: two classes share a name, a name is empty, or the file cannot be used.
    """
    renamed = {}
    if names_file is not None:
        renamed = _read_names(Path(names_file), labels, strict_names)
    names = tuple(renamed.get(label, " ".join(label.replace("_", " ").split())) for label in labels)
    if "" in names:
        label = labels[names.index("")]
        raise DataError(f"{root}: class {label!r} has an empty name; give it one")
    for name, times in Counter(name.casefold() for name in names).items():
        if times > 1:
            twins = [
                label for label, own in zip(labels, names, strict=True) if own.casefold() == name
            ]
            raise DataError(
                f"{root}: classes {twins} have the same name {name!r}; "
                f"merge them or name them apart with --class-names"
            )
    return names


def distinct_names(names: Iterable[str], others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return a list of names with single spaces in them, in their order.

    Args:
        names: of classes.
        others: names that are there already.

    Raises:
        ConfigError: no list of texts, an empty name, or two that differ in spelling at most, for
            prompts would hardly tell these apart.
    """
    listed = None if isinstance(names, str) else list(names)
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"class names: expected a list of texts, came {names!r}")
    found = [" ".join(name.split()) for name in listed]
    if "" in found:
        raise ConfigError(f"class names: the name at place {found.index('') + 1} is empty")
    known = {spelled_alike(name): name for name in others}
    for name in found:
        if (twin := known.get(spelled_alike(name))) is not None:
            raise ConfigError(
                f"class names: {name!r} is there already, as {twin!r}; name each once"
            )
        known[spelled_alike(name)] = name
    return tuple(found)


def spelled_alike(name: str) -> str:
    """Return what two names have in common that differ only in case and underscores."""
    return " ".join(name.replace("_", " ").split()).casefold()


def _read_names(path: Path, labels: tuple[str, ...], strict: bool) -> dict[str, str]:
    if path.suffix.lower() == ".csv":
        pairs = label_files.read_pairs(path)
    else:
        pairs = read_json(path, DataError)
        texts = isinstance(pairs, dict) and all(isinstance(name, str) for name in pairs.values())
        if not texts:
            raise DataError(f'{path}: expected a JSON object such as {{"aquarium_fish": "fish"}}')
    for label, name in pairs.items():
        if label not in labels and strict:
            near = get_close_matches(label, labels, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{path}: {label!r} is no class of the data set{hint}")
        if not name.strip():
            raise DataError(f"{path}: the name of {label!r} is empty")
    return {label: " ".join(name.split()) for label, name in pairs.items()}
