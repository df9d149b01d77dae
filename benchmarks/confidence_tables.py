"""The cells of `benchmarks.confidence` as Markdown: means ± deviations over the seeds."""

from collections.abc import Mapping
from functools import reduce
from itertools import product
from statistics import mean, stdev
from typing import Any

from capt_deploy.confidence.conformal import METHODS

COVERAGES = (0.8, 0.9, 0.95)
ACCURACIES = (0.7, 0.8, 0.9)
BASE, NEW = "base", "new"


def ece_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ECE-15 by model, photo set and scope."""
    columns = list(product(_worlds(cells), (BASE, NEW)))
    first = next(iter(cells.values()))
    lines = _header(["ECE-15, %", *(f"{world}: {scope}" for world, scope in columns)])
    for name in first["ece_15"]:
        texts = [_spread(cells, world, "ece_15", name, scope) for world, scope in columns]
        lines.append(_line([name, *texts]))
    texts = [_spread(cells, world, "chance", scope) for world, scope in columns]
    return "\n".join([*lines, _line(["chance alone, were capt perfectly calibrated", *texts])])


def sets_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return coverage and size of prediction sets."""
    worlds = _worlds(cells)
    titles = ("200 splits", "classes a set", "bundle, base", "bundle, new")
    lines = _header(["coverage, %", *(f"{w}: {title}" for w in worlds for title in titles)])
    for method, coverage in product(METHODS, COVERAGES):
        key, texts = f"{method} {coverage}", []
        for world in worlds:
            texts += [
                _spread(cells, world, "sets", key, "coverage"),
                _spread(cells, world, "sets", key, "size", unit=1),
                _spread(cells, world, "bundle", BASE, key, "coverage"),
                _spread(cells, world, "bundle", NEW, key, "coverage"),
            ]
        lines.append(_line([f"{method.upper()}, {100 * coverage:.0f}", *texts]))
    return "\n".join(lines)


def rest_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rejection and familiarity."""
    worlds = _worlds(cells)
    lines = _header(["%", *worlds])
    for accuracy, name in product(ACCURACIES, ("accuracy", "accepted")):
        key = f"accuracy {accuracy}"
        texts = [_spread(cells, world, "bundle", BASE, key, name) for world in worlds]
        lines.append(_line([f"accuracy {100 * accuracy:.0f} wanted: {name}", *texts]))
    first = next(iter(cells.values()))["familiarity"]
    for unknown, score in product(first, first["pictograms"]):
        texts = [_spread(cells, world, "familiarity", unknown, score) for world in worlds]
        lines.append(_line([f"AUROC against {unknown}: {score}", *texts]))
    return "\n".join(lines)


def _worlds(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["world"] for cell in cells.values()))


def _spread(
    cells: Mapping[str, Mapping[str, Any]], world: str, *path: str, unit: float = 100
) -> str:
    """Return mean ± standard deviation over the seeds of the value at a path of keys, in %."""
    in_world = [cell for cell in cells.values() if cell["world"] == world]
    values: list[Any] = [reduce(lambda value, key: value[key], path, cell) for cell in in_world]
    known = [unit * float(value) for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{mean(known):.1f}{spread}" + ("" if len(known) == 3 else f" ({len(known)})")


def _header(titles: list[str]) -> list[str]:
    return [_line(titles), "|---" * len(titles) + "|"]


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"
