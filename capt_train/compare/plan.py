"""The configuration of `capt-compare`, and the cells that it asks for."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import expand_home, read_json
from capt_train.compare.catalogue import DATASETS
from capt_train.config import TrainConfig
from capt_train.methods import METHODS
from capt_train.parts import GROUPS, PARTS, members
from capt_train.settings import nearest

CALIBRATIONS = ("none", "temperature", "chosen", "dac", "sals")
# Keys with the types that their values may have
_KEYS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "pretrained", "root", "reference"), (str,)),
    **dict.fromkeys(("methods", "shots", "calibrations", "devices"), (list,)),
    **dict.fromkeys(("data", "targets"), (list, dict)),
    **dict.fromkeys(("variants", "settings"), (dict,)),
    "seeds": (list, dict),
    "processes": (int,),
}
_DATA_KEYS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "model", "pretrained", "class_names", "template", "classes"), (str,)),
    "settings": (dict,),
}
_METHOD_KEYS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "method"), (str,)),
    **dict.fromkeys(("with", "without", "data", "seeds"), (list,)),
    "settings": (dict,),
}
_WORDS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}
# Settings that name a place: a cell knows them by the last part of the path, so that it is the same
# in another folder
_PLACES = ("data", "model", "class_names", "distillation.teacher", "distillation.unlabelled")


class Target(NamedTuple):
    """A further data set that a run is measured on."""

    path: str
    template: str | None  # hand-written prompt of its classes; None for that of the run


@dataclass(frozen=True)
class Cell:
    """One run: a method on a data set, with a number of shots and a seed."""

    data: str
    method: str
    variant: str
    config: TrainConfig
    targets: Mapping[str, Target] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the name of the cell."""
        shots = "all" if self.config.shots is None else self.config.shots
        return f"{self.data} / {self.row} / {shots} / {self.config.seed}"

    @property
    def row(self) -> str:
        """Return the method with its variant."""
        return f"{self.method} {self.variant}".strip()

    @property
    def fingerprint(self) -> str:
        """Return a hash of all settings, and of the names of model, data and targets."""
        values = {k: v for k, v in self.config.values().items() if k not in ("device", "workers")}
        values |= {name: Path(str(values[name])).name for name in _PLACES}
        targets = {n: (Path(t.path).name, t.template) for n, t in self.targets.items()}
        content = json.dumps([values, targets], sort_keys=True, default=list)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    cells: tuple[Cell, ...]  # the first seed of all rows before the second
    skipped: tuple[str, ...]  # rows that cannot be, with the reason
    calibrations: tuple[str, ...]
    reference: str | None  # row that the others are tested against
    processes: int
    devices: tuple[str, ...]

    @property
    def data(self) -> list[str]:
        """Return the names of the data sets, in the order of the configuration."""
        return [*dict.fromkeys(cell.data for cell in self.cells)]

    @property
    def rows(self) -> list[str]:
        """Return the methods with their variants, in the order of the configuration."""
        return [*dict.fromkeys(cell.row for cell in self.cells)]


@dataclass(frozen=True)
class _Method:
    """A row of the tables."""

    name: str
    settings: Mapping[str, Any]
    data: Sequence[str] | None  # data sets that have the row; None for all
    seeds: Sequence[int] | None

    def has(self, data: str, seed: int) -> bool:
        """Tell whether the row is measured on a data set with a seed."""
        on_data = self.data is None or data in self.data
        return on_data and (self.seeds is None or seed in self.seeds)


def read_plan(path: Path) -> Plan:
    """Read a configuration; relative paths in it start at its folder.

    Raises:
        CaptError: a key or a value cannot be used, or a data set is missing.
    """
    content = read_json(path, ConfigError)
    try:
        return _plan(content, path.parent)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause


def _plan(content: Any, folder: Path) -> Plan:
    _check(content)
    root = folder / expand_home(content.get("root", "."))
    data = {
        name: _data_settings(name, entry, content, folder, root)
        for name, entry in _named(content["data"]).items()
    }
    targets = {
        name: Target(str(_data_path(name, entry, folder, root)), _template(name, None))
        for name, entry in _named(content.get("targets", {})).items()
    }
    methods = [_method(entry, folder, data) for entry in content["methods"]]
    variants = content.get("variants", {"": []})
    cells, skipped = [], dict[str, None]()
    for draw in _draws(content):
        for name, data_settings in data.items():
            for method in methods:
                if not method.has(name, draw[1]):
                    continue
                for variant, added in variants.items():
                    values = {**data_settings, **method.settings}
                    config = _config(values, added, draw)
                    if isinstance(config, str):
                        skipped[f"{method.name} {variant}: {config}; left out"] = None
                    else:
                        cells.append(Cell(name, method.name, variant, config, targets))
    key, times = Counter(cell.key for cell in cells).most_common(1)[0] if cells else ("", 1)
    if times > 1:
        raise ConfigError(f"methods: two have the same name, {key!r}; rename one")
    reference, rows = content.get("reference"), sorted({cell.row for cell in cells})
    if reference is not None and reference not in rows:
        raise ConfigError(f"reference: no row {reference!r}; {nearest(reference, rows)}")
    return Plan(
        tuple(cells),
        tuple(skipped),
        tuple(content.get("calibrations", ("none", "chosen"))),
        reference,
        content.get("processes", 1),
        tuple(content.get("devices", ("auto",))),
    )


def _check(content: Any) -> None:
    """Check keys, types and names.

    Raises:
        ConfigError: one is wrong.
    """
    _check_keys("", content, _KEYS)
    for key in ("data", "methods", "shots", "devices"):
        needed = key in ("data", "methods") or key in content
        if needed and not content.get(key):
            raise ConfigError(f"{key}: expected at least one")
    if content.get("processes", 1) < 1:
        raise ConfigError("processes: expected 1 or more")
    for name in content.get("calibrations", ()):
        if name not in CALIBRATIONS:
            raise ConfigError(f"calibrations: no {name!r}; {nearest(str(name), CALIBRATIONS)}")
    for variant, parts in content.get("variants", {}).items():
        if not isinstance(parts, list):
            raise ConfigError(f"variants.{variant}: expected a list of parts, came {parts!r}")
        for part in parts:
            if part not in (*PARTS, *GROUPS):
                known = (*PARTS, *GROUPS)
                raise ConfigError(f"variants.{variant}: no part {part!r}; {nearest(part, known)}")


def _check_keys(place: str, values: Any, known: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{place or 'the file'}: expected a JSON object, came {values!r}")
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{place}{key}: no such key; {nearest(key, sorted(known))}")
        if value is not None and not isinstance(value, known[key]):
            expected = " or ".join(_WORDS[kind] for kind in known[key])
            raise ConfigError(f"{place}{key}: expected {expected}, came {value!r}")


def _config(
    values: Mapping[str, Any], added: Sequence[str], draw: tuple[int | None, int]
) -> TrainConfig | str:
    """Return the settings of a cell, or why there is none.

    Args:
        values: settings of the data set and of the method.
        added: the parts of a variant.
        draw: number of shots and seed.
    """
    shots, seed = draw
    classes = str(values.get("classes", "all"))
    # an ensemble of templates is part of a method
    if "prompt.templates" in METHODS[values["method"]].settings(shots, classes):
        values = {name: value for name, value in values.items() if name != "prompt.templates"}
    rest = {name: value for name, value in values.items() if name not in ("data", "model")}
    start = TrainConfig(str(values["data"]), str(values["model"]))
    config = start.with_settings({**rest, "shots": shots, "seed": seed})
    if not added:
        return config
    if not any(PARTS[name].side and not PARTS[name].closed_form for name in config.parts):
        return "nothing is trained by a loss"
    try:
        return config.with_settings({"added": (*config.added, *added)})
    except ConfigError as cause:
        return str(cause)


def _draws(content: Mapping[str, Any]) -> Iterator[tuple[int | None, int]]:
    """Yield numbers of shots with seeds; the first seed of all before the second."""
    shots, seeds = content.get("shots", [16]), content.get("seeds", [1])
    by_shots = seeds if isinstance(seeds, dict) else {str(count): seeds for count in shots}
    if set(by_shots) != {str(count) for count in shots}:
        raise ConfigError(f"seeds: expected a list for each of the shots {shots}")
    numbers = [count for count in shots if count != "all"]
    for number in (*numbers, *(seed for listed in by_shots.values() for seed in listed)):
        if not isinstance(number, int):
            raise ConfigError(
                f'shots, seeds: expected whole numbers, or shots "all"; came {number!r}'
            )
    for place in range(max(map(len, by_shots.values()))):
        for count in shots:
            if place < len(by_shots[str(count)]):
                yield None if count == "all" else count, by_shots[str(count)][place]


def _data_settings(
    name: str, entry: Any, content: Mapping[str, Any], folder: Path, root: Path
) -> dict[str, Any]:
    """Return the settings that a data set brings."""
    entry = entry if isinstance(entry, dict) else {"path": entry}
    _check_keys(f"data.{name}.", entry, _DATA_KEYS)
    model = entry.get("model", content.get("model"))
    if model is None:
        raise ConfigError(f"data.{name}: expected a model, there or for all data")
    template = _template(name, entry.get("template"))
    class_names = entry.get("class_names")
    values = {
        "data": str(_data_path(name, entry.get("path"), folder, root)),
        "model": _model(model, folder),
        "pretrained": entry.get("pretrained", content.get("pretrained")),
        "classes": entry.get("classes", "all"),
        "prompt.templates": None if template is None else (template,),
        "class_names": class_names and str(folder / expand_home(class_names)),
        **content.get("settings", {}),
        **entry.get("settings", {}),
    }
    return {name: value for name, value in values.items() if value is not None}


def _template(name: str, template: str | None) -> str | None:
    """Return the hand-written prompt of a data set: the given one, else that of the field."""
    return template or (DATASETS[name].template if name in DATASETS else None)


def _data_path(name: str, path: Any, folder: Path, root: Path) -> Path:
    if isinstance(path, str):
        return (folder / expand_home(path)).resolve()
    if path is not None or name not in DATASETS:
        raise ConfigError(f"{name}: expected a path; known without one: {', '.join(DATASETS)}")
    return DATASETS[name].path(root)


def _model(model: str, folder: Path) -> str:
    """Return the model; a relative folder of one starts at the configuration."""
    local = model.removeprefix("local-dir:")
    return f"local-dir:{(folder / local).resolve()}" if local != model else model


def _method(entry: Any, folder: Path, data: Collection[str]) -> _Method:
    """Return a row; paths that exist beside the configuration are made absolute."""
    entry = {"method": entry} if isinstance(entry, str) else entry
    _check_keys("methods.", entry, _METHOD_KEYS)
    method = entry.get("method", "")
    if method not in METHODS:
        raise ConfigError(f"methods: no method {method!r}; {nearest(method, [*METHODS])}")
    for name in entry.get("data", ()):
        if name not in data:
            raise ConfigError(f"methods.data: no data set {name!r}; {nearest(str(name), [*data])}")
    values = {"method": method, **entry.get("settings", {})}
    for name in ("distillation.teacher", "distillation.unlabelled"):
        if (path := values.get(name)) is not None:
            exists = (folder / expand_home(path)).exists()
            values[name] = str((folder / path).resolve()) if exists else _model(str(path), folder)
    for key, name in (("with", "added"), ("without", "without")):
        if key in entry:
            values[name] = tuple(members(entry[key]))
    label = str(entry.get("name", method))
    return _Method(label, values, entry.get("data"), entry.get("seeds"))


def _named(entries: Any) -> dict[str, Any]:
    """Return entries by name; a list names data sets of the catalogue."""
    return dict.fromkeys(map(str, entries)) if isinstance(entries, list) else entries
