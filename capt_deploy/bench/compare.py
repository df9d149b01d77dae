"""Compare the rows of two runs of `capt-bench`, and say what became slower.

Rows belong together if backend, kind of device, precision, batch, scope and concurrency are the
same. The figure is the median. It became slower if new / old > 1 + tolerance, faster if
old / new > 1 + tolerance. A row of the old run that the new one was asked for, but lacks, fails the
comparison as one that became slower does: its backend no longer runs. The tolerance of a pair is

    max(0.1, 3·√(error_old² + error_new²)),  error = 1.25·s / √turns / p50,

where s is the standard deviation of the medians of a run's turns (`turn_p50_ms`), and 1.25·s / √n
the standard error of a median of n normal figures. Latencies of neighbouring runs resemble each
other, so the spread of single runs says nothing of that error; turns lie apart. Where a run has
fewer than two turns, as in older files, its error is unknown and counts as 0. A pair with a
tolerance above 50 % that is neither slower nor faster is `unclear`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from capt_deploy.bench.cases import EVERY, ON_GPU, Wanted
from capt_deploy.core.console import table
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import read_json

_LEAST_TOLERANCE = 0.1  # less than that differs between two runs of the same program
_ERRORS = 3.0  # standard errors
_OF_MEDIAN = 1.25  # √(π/2): how much less certain than a mean the median of normal figures is
_UNSTEADY = 0.5  # a tolerance above this hides what one would like to know
_ADVICE = " to be judged; measure longer (--seconds), on a quieter machine"
_TEXTS, _WHOLE = ("backend", "device", "precision", "scope"), ("batch", "iterations")
_MEASURED = ("p50_ms", "cv")

Row = Mapping[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """The same row of two runs."""

    name: str
    old_ms: float
    new_ms: float
    tolerance: float  # share

    @property
    def ratio(self) -> float:
        """New over old: above 1 is slower."""
        return self.new_ms / self.old_ms

    @property
    def verdict(self) -> str:
        """`slower`, `faster`, `same`, or `unclear` where even much would not show."""
        if self.ratio > 1 + self.tolerance:
            return "slower"
        if 1 / self.ratio > 1 + self.tolerance:
            return "faster"
        return "unclear" if self.tolerance > _UNSTEADY else "same"


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]  # rows of the old run that the new one should have as well
    only_old: tuple[str, ...]  # those that it was not asked for
    only_new: tuple[str, ...]
    differences: tuple[str, ...]  # of the conditions; they may explain a verdict

    @property
    def regressed(self) -> bool:
        """Whether a row became slower."""
        return any(pair.verdict == "slower" for pair in self.pairs)

    @property
    def failed(self) -> bool:
        """Whether a row became slower or is missing."""
        return self.regressed or bool(self.missing)

    def __str__(self) -> str:
        header = ("row", "old p50 ms", "new p50 ms", "new / old", "tolerance", "verdict")
        cells = [
            (
                *(pair.name, f"{pair.old_ms:.3f}", f"{pair.new_ms:.3f}", f"{pair.ratio:.3f}"),
                *(f"{100 * pair.tolerance:.1f} %", pair.verdict),
            )
            for pair in self.pairs
        ]
        slower = sum(pair.verdict == "slower" for pair in self.pairs)
        missing = len(self.missing)
        unclear = sum(pair.verdict == "unclear" for pair in self.pairs)
        return "\n".join(
            [
                table(header, cells),
                *(f"missing in this run: {name}" for name in self.missing),
                *(f"only in the old file: {name}" for name in self.only_old),
                *(f"not in the old file: {name}" for name in self.only_new),
                *(f"note: {text}" for text in self.differences),
                *([f"note: {unclear} rows were too unsteady{_ADVICE}"] if unclear else []),
                f"{slower} of {len(self.pairs)} rows became slower, {missing} are missing",
            ]
        )


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `capt-bench --json` printed.

    Raises:
        ConfigError: it is something else.
    """
    rows = read_json(path, ConfigError)
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise ConfigError(f"{path}: expected a list of rows from capt-bench --json")
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in _TEXTS)
        and all(_is_number(row.get(key)) and row[key] >= 1 for key in _WHOLE)
        and all(_is_number(row.get(key)) and row[key] >= 0 for key in _MEASURED)
        and row["p50_ms"] > 0
        and _is_number(row.get("concurrency", 1))
        and isinstance(row.get("turn_p50_ms", []), list)
        and all(map(_is_number, row.get("turn_p50_ms", [])))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def compare_rows(
    old: Sequence[Row], new: Sequence[Row], wanted: Wanted | None = None
) -> Comparison:
    """Compare row by row; `wanted` is what the new run was asked for, None all that the old has.

    Raises:
        ConfigError: no row has a partner, so nothing could be said.
    """
    before, after = ({_key(row): row for row in rows} for rows in (old, new))
    common = [key for key in after if key in before]
    if not common:
        raise ConfigError("the two runs have no row in common: there is nothing to compare")
    gone = [key for key in before if key not in after]
    missing = [key for key in gone if wanted is None or _is_asked_for(key, wanted, after)]
    return Comparison(
        tuple(_pair(key, before[key], after[key]) for key in common),
        tuple(map(_name, missing)),
        tuple(_name(key) for key in gone if key not in missing),
        tuple(_name(key) for key in after if key not in before),
        tuple(_differences([before[key] for key in common], [after[key] for key in common])),
    )


def _key(row: Row) -> Key:
    """Return what makes rows the same; of the device only its kind, as in `cuda:0 (name)`."""
    kind = row["device"].split(":")[0]
    own = (row["backend"], kind, row["precision"], row["scope"])
    return (*own, row["batch"], row.get("concurrency", 1))


def _is_asked_for(key: Key, wanted: Wanted, measured: Iterable[Key]) -> bool:
    """Tell whether a run should have a row; backends named one by one are there, or it ends."""
    backend, kind, precision, scope, batch, callers = key
    names = {*wanted.backends}
    if names & {"auto", "onnxruntime", EVERY}:  # that may have become others
        asked = True
    elif ON_GPU in names:
        asked = kind != "cpu"
    else:
        asked = (backend, kind) in {own[:2] for own in measured}
    precisions = {*wanted.precisions} - {EVERY}
    return (
        asked
        and (not precisions or EVERY in wanted.precisions or precision in precisions)
        and scope in wanted.scopes
        and batch in wanted.batches
        and callers == (1 if scope == "device" else wanted.concurrency)
    )


def _name(key: Key) -> str:
    *words, batch, callers = key
    return f"{' '.join(words)}, batch {batch}" + (f", {callers} callers" if callers > 1 else "")


def _pair(key: Key, old: Row, new: Row) -> Pair:
    tolerance = max(_LEAST_TOLERANCE, _ERRORS * math.hypot(_error(old), _error(new)))
    return Pair(_name(key), old["p50_ms"], new["p50_ms"], tolerance)


def _error(row: Row) -> float:
    """Return the standard error of a row's median as a share of it; 0 where nothing tells."""
    turns = row.get("turn_p50_ms", [])
    if len(turns) < 2:
        return 0.0
    error: float = _OF_MEDIAN * stdev(turns) / math.sqrt(len(turns)) / row["p50_ms"]
    return error


def _differences(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Say which conditions are other ones than in the old file, each once."""
    sought: Mapping[str, Callable[[Row], Any]] = {
        "device": lambda row: row["device"],
        "graph": lambda row: row.get("graph"),
        "images": lambda row: row.get("images"),
        "number of threads": lambda row: row.get("threads"),
        "processor": lambda row: _machine(row).get("cpu"),
        "cores": lambda row: _machine(row).get("cores"),
        "GPUs": lambda row: [_of(gpu, "name") for gpu in _machine(row).get("gpus") or []],
        "driver": lambda row: [_of(gpu, "driver") for gpu in _machine(row).get("gpus") or []],
        "version": _versions,
    }
    found: dict[str, None] = {}
    for a, b in zip(old, new, strict=True):
        for what, read in sought.items():
            was, now = read(a), read(b)
            if was != now:
                found[f"other {what}: was {_text(was)}, is {_text(now)}"] = None
    return list(found)


def _machine(row: Row) -> Mapping[str, Any]:
    machine = row.get("machine")
    return machine if isinstance(machine, dict) else {}


def _versions(row: Row) -> list[str]:
    own = row.get("versions")
    return [f"{name} {version}" for name, version in own.items()] if isinstance(own, dict) else []


def _of(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, dict) else None


def _text(value: Any) -> str:
    """Shorten what is too long for a line, such as a hash."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    text = "unknown" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
