"""The configuration of `capt-compare`, and the cells that it asks for."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import expand_home, read_json
from capt_train.compare.catalogue import DATASETS
from capt_train.config import TrainConfig
from capt_train.methods import METHODS
from capt_train.parts import PARTS, members
from capt_train.settings import nearest

CALIBRATIONS = ("none", "temperature", "chosen", "dac", "sals")
_KEYS = {
    *("model", "pretrained", "root", "data", "methods", "variants", "shots", "seeds"),
    *("calibrations", "targets", "settings", "reference", "processes", "devices"),
}
_DATA_KEYS = {"path", "model", "pretrained", "classes", "class_names", "template", "settings"}
_METHOD_KEYS = {"name", "method", "with", "without", "settings", "data", "seeds"}
# Settings that do not change a result
_PLACES = {"data", "model", "device", "workers", "class_names"}


@dataclass(frozen=True)
class Cell:
    """One run: a method on a data set, with a number of shots and a seed."""

    data: str
    method: str
    variant: str
    config: TrainConfig
    targets: Mapping[str, str] = field(default_factory=dict)  # paths of further data sets

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
        """Return a hash of everything that decides the result, but for the photos."""
        values = {k: v for k, v in self.config.values().items() if k not in _PLACES}
        values["distillation.teacher"] = Path(str(values["distillation.teacher"])).name
        content = json.dumps([values, sorted(self.targets)], sort_keys=True, default=list)
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


def read_plan(path: Path) -> Plan:
    """Read a configuration; relative paths in it start at its folder.

    Raises:
        CaptError: a key or a value cannot be used, or a data set is missing.
    """
    content = read_json(path, ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object with data, methods, shots and seeds")
    try:
        return _plan(content, path.parent)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause


def _plan(content: Mapping[str, Any], folder: Path) -> Plan:
    calibrations = _checked(content)
    root = folder / expand_home(content.get("root", "."))
    targets = {
        name: str(_data_path(name, value, folder, root))
        for name, value in _named(content.get("targets", {}), "targets").items()
    }
    methods = [_method(entry, folder) for entry in content["methods"]]
    variants = content.get("variants", {"": []})
    if not isinstance(variants, dict):
        raise ConfigError('variants: expected {"name": ["part", …]}')
    cells, skipped = [], dict[str, None]()
    for shots, seed in _draws(content):
        for name, entry in _named(content["data"], "data").items():
            usual = _data_settings(name, entry, content, folder, root)
            for method in methods:
                if not method.has(name, seed):
                    continue
                for variant, added in variants.items():
                    values = {**usual, **method.settings}
                    draw = shots, seed
                    cell = _cell(name, method.name, variant, values, added, draw, targets)
                    if isinstance(cell, Cell):
                        cells.append(cell)
                    else:
                        skipped[cell] = None
    repeated = {cell.key for cell in cells if sum(c.key == cell.key for c in cells) > 1}
    if repeated:
        raise ConfigError(f"methods: two have the same name, {sorted(repeated)[0]!r}; rename one")
    return Plan(
        tuple(cells),
        tuple(skipped),
        calibrations,
        _reference(content.get("reference"), {cell.row for cell in cells}),
        int(content.get("processes", 1)),
        tuple(content.get("devices", ("auto",))),
    )


def _checked(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Check keys and return the calibrations."""
    _check_keys("", content, _KEYS)
    for key in ("data", "methods"):
        if not content.get(key):
            raise ConfigError(f"{key}: expected at least one")
    calibrations = tuple(content.get("calibrations", ("none", "chosen")))
    for name in calibrations:
        if name not in CALIBRATIONS:
            raise ConfigError(f"calibrations: no {name!r}; {nearest(str(name), CALIBRATIONS)}")
    return calibrations


def _reference(name: str | None, rows: set[str]) -> str | None:
    if name is not None and name not in rows:
        raise ConfigError(f"reference: no row {name!r}; {nearest(str(name), sorted(rows))}")
    return name


def _cell(
    data: str,
    label: str,
    variant: str,
    values: Mapping[str, Any],
    added: Sequence[str],
    draw: tuple[int | None, int],
    targets: Mapping[str, str],
) -> Cell | str:
    """Return the cell, or why there is none."""
    shots, seed = draw
    classes = str(values.get("classes", "all"))
    brought = METHODS[values["method"]].settings(shots, classes)
    if "prompt.templates" in brought:  # an ensemble is part of the method
        values = {name: value for name, value in values.items() if name != "prompt.templates"}
    values = {**values, "shots": shots, "seed": seed}
    source, model = str(values.pop("data")), str(values.pop("model"))
    config = TrainConfig(source, model).with_settings(values)
    if added:
        if not _is_trained(config):
            return f"{label} {variant}: nothing is trained by a loss; left out"
        try:
            config = config.with_settings({"added": (*config.added, *added)})
        except ConfigError as cause:
            return f"{label} {variant}: {cause}; left out"
    return Cell(data, label, variant, config, targets)


def _is_trained(config: TrainConfig) -> bool:
    return any(PARTS[name].side and not PARTS[name].closed_form for name in config.parts)


def _draws(content: Mapping[str, Any]) -> Iterator[tuple[int | None, int]]:
    """Yield numbers of shots with seeds; the first seed of all before the second."""
    shots = content.get("shots", [16])
    seeds = content.get("seeds", [1])
    by_shots = seeds if isinstance(seeds, dict) else {str(count): seeds for count in shots}
    if set(by_shots) != {str(count) for count in shots}:
        raise ConfigError(f"seeds: expected a list for each of the shots {shots}")
    for place in range(max(map(len, by_shots.values()))):
        for count in shots:
            if place < len(by_shots[str(count)]):
                yield None if count == "all" else int(count), int(by_shots[str(count)][place])


def _data_settings(
    name: str, entry: Any, content: Mapping[str, Any], folder: Path, root: Path
) -> dict[str, Any]:
    """Return the settings that a data set brings."""
    entry = entry if isinstance(entry, dict) else {"path": entry}
    _check_keys(f"data.{name}.", entry, _DATA_KEYS)
    model = entry.get("model", content.get("model"))
    if model is None:
        raise ConfigError(f"data.{name}: expected a model, there or for all data")
    values = {
        "data": str(_data_path(name, entry.get("path"), folder, root)),
        "model": _model(str(model), folder),
        "pretrained": entry.get("pretrained", content.get("pretrained")),
        "classes": entry.get("classes", "all"),
        **content.get("settings", {}),
        **entry.get("settings", {}),
    }
    template = entry.get("template", DATASETS[name].template if name in DATASETS else None)
    if template is not None:
        values["prompt.templates"] = (template,)
    if "class_names" in entry:
        values["class_names"] = str(folder / expand_home(entry["class_names"]))
    return {name: value for name, value in values.items() if value is not None}


def _data_path(name: str, path: str | None, folder: Path, root: Path) -> Path:
    if path is not None:
        return (folder / expand_home(path)).resolve()
    if name not in DATASETS:
        raise ConfigError(f"data.{name}: expected a path; known without one: {', '.join(DATASETS)}")
    return DATASETS[name].path(root)


def _model(model: str, folder: Path) -> str:
    """Return the model; a relative folder of one starts at the configuration."""
    local = model.removeprefix("local-dir:")
    return f"local-dir:{(folder / local).resolve()}" if local != model else model


@dataclass(frozen=True)
class _Method:
    """A row of the tables."""

    name: str
    settings: Mapping[str, Any]
    data: Sequence[str] | None = None  # data sets that have the row; None for all
    seeds: Sequence[int] | None = None

    def has(self, data: str, seed: int) -> bool:
        """Tell whether the row is measured on a data set with a seed."""
        return (self.data is None or data in self.data) and (
            self.seeds is None or seed in self.seeds
        )


def _method(entry: Any, folder: Path) -> _Method:
    """Return a row's name and its settings; paths that exist beside the file are made absolute."""
    entry = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "method" not in entry:
        raise ConfigError(f"methods: expected a name or an object with method, came {entry!r}")
    _check_keys("methods.", entry, _METHOD_KEYS)
    if entry["method"] not in METHODS:
        name = str(entry["method"])
        raise ConfigError(f"methods: no method {name!r}; {nearest(name, [*METHODS])}")
    values = {"method": entry["method"], **entry.get("settings", {})}
    for name in ("distillation.teacher", "distillation.unlabelled"):
        if (path := values.get(name)) is not None:
            values[name] = _model(str(path), folder)
            if (folder / expand_home(path)).exists():
                values[name] = str((folder / expand_home(path)).resolve())
    for key, name in (("with", "added"), ("without", "without")):
        if key in entry:
            values[name] = tuple(members(entry[key]))
    name = str(entry.get("name", entry["method"]))
    return _Method(name, values, entry.get("data"), entry.get("seeds"))


def _named(entries: Any, key: str) -> dict[str, Any]:
    """Return entries by name; a list names data sets of the catalogue."""
    if isinstance(entries, list):
        return dict.fromkeys(map(str, entries))
    if not isinstance(entries, dict):
        raise ConfigError(f"{key}: expected a list of names or an object of paths")
    return entries


def _check_keys(place: str, values: Mapping[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{place}{key}: no such key; {nearest(key, sorted(known))}")
