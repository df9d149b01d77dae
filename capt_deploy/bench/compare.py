"""Compare the rows of two runs of `capt-bench`, and report which rows became slower.

Rows belong together if backend, kind of device, precision, batch, scope and concurrency are equal.
Their medians are compared: a row is slower if new / old > 1 + tolerance, faster if
old / new > 1 + tolerance. A row of the old run that the new run should have, but lacks, fails the
comparison like a slower one: its backend no longer runs. The tolerance of a pair is

    max(0.1, 3·√(error_old² + error_new²)),  error = 1.25·s / √turns / p50,

where s is the standard deviation of the medians of a run's turns (`turn_p50_ms`), and 1.25·s / √n
the standard error of a median of n normal values. Neighbouring latencies resemble each other, so
the spread of single runs says nothing about that error; turns lie apart. Where a run has fewer than
two turns, as in older files, its error is unknown and counts as 0. A pair with a tolerance above
50 % that is neither slower nor faster is `unclear`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from capt_deploy.backends.spec import find_backends
from capt_deploy.bench.cases import EVERY, ON_GPU, BenchRequest
from capt_deploy.core.console import counted, table
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import read_json

_MIN_TOLERANCE = 0.1  # two runs of the same program differ by less
_STANDARD_ERRORS = 3.0
_MEDIAN_TO_MEAN = 1.25  # √(π/2): standard error of a median over that of a mean, normal values
_UNSTEADY = 0.5  # a tolerance above this hides real changes

Row = Mapping[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class RowPair:
    """The same row of two runs."""

    name: str
    old_ms: float
    new_ms: float
    tolerance: float  # share

    @property
    def ratio(self) -> float:
        """Return new over old: above 1 is slower."""
        return self.new_ms / self.old_ms

    @property
    def verdict(self) -> str:
        """Return `slower`, `faster`, `same`, or `unclear` where the tolerance is too large."""
        if self.ratio > 1 + self.tolerance:
            return "slower"
        if 1 / self.ratio > 1 + self.tolerance:
            return "faster"
        return "unclear" if self.tolerance > _UNSTEADY else "same"


@dataclass(frozen=True)
class Comparison:
    """The rows of two runs, compared."""

    pairs: tuple[RowPair, ...]
    missing: tuple[str, ...]  # rows of the old run that the new one should have as well
    only_old: tuple[str, ...]  # rows of the old run that the new one was not to measure
    only_new: tuple[str, ...]
    differences: tuple[str, ...]  # between the conditions; they may explain a verdict

    def count(self, verdict: str) -> int:
        """Return how many pairs have a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)

    @property
    def failed(self) -> bool:
        """Return whether a row became slower or is missing."""
        return bool(self.count("slower") or self.missing)

    def __str__(self) -> str:
        header = ("row", "old p50 ms", "new p50 ms", "new / old", "tolerance", "verdict")
        cells = [
            (
                *(pair.name, f"{pair.old_ms:.3f}", f"{pair.new_ms:.3f}", f"{pair.ratio:.3f}"),
                *(f"{100 * pair.tolerance:.1f} %", pair.verdict),
            )
            for pair in self.pairs
        ]
        lines = [table(header, cells)]
        lines += [f"missing in this run: {name}" for name in self.missing]
        lines += [f"only in the old file: {name}" for name in self.only_old]
        lines += [f"not in the old file: {name}" for name in self.only_new]
        lines += [f"note: {text}" for text in self.differences]
        if unclear := self.count("unclear"):
            lines.append(
                f"note: {counted(unclear, 'row')} too unsteady to be judged; measure longer "
                "(--seconds), on a quieter machine"
            )
        slower, missing = self.count("slower"), len(self.missing)
        rows = counted(len(self.pairs), "row")
        return "\n".join([*lines, f"{rows} compared: {slower} slower, {missing} missing"])


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `capt-bench --json` printed into a file.

    Raises:
        ConfigError: the file holds something else.
    """
    rows = read_json(path, ConfigError)
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise ConfigError(f"{path}: expected a list of rows from capt-bench --json")
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    turns = row.get("turn_p50_ms", [])
    numbers = [row.get("p50_ms"), row.get("batch"), row.get("concurrency", 1)]
    texts = [row.get(key) for key in ("backend", "device", "precision", "scope")]
    return (
        isinstance(turns, list)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers + turns)
    )


def compare_rows(
    old: Sequence[Row], new: Sequence[Row], request: BenchRequest | None = None
) -> Comparison:
    """Compare the rows of two runs.

    Args:
        old: rows of the earlier run.
        new: rows of the later run.
        request: the rows that the later run should have; None: all of the earlier run.

    Raises:
        ConfigError: the runs have no row in common.
    """
    before, after = ({_key(row): row for row in rows} for rows in (old, new))
    common = [key for key in after if key in before]
    if not common:
        raise ConfigError("the two runs have no row in common: there is nothing to compare")
    gone = [key for key in before if key not in after]
    missing = [key for key in gone if request is None or _is_expected(key, request, after)]
    differences = {text: None for key in common for text in _differences(before[key], after[key])}
    return Comparison(
        tuple(_pair(key, before[key], after[key]) for key in common),
        tuple(map(_name, missing)),
        tuple(_name(key) for key in gone if key not in missing),
        tuple(_name(key) for key in after if key not in before),
        tuple(differences),
    )


def _key(row: Row) -> Key:
    """Return the key that identifies a row; of a device such as `cuda:0 (name)` only the kind."""
    kind = row["device"].split(":")[0]
    concurrency = row.get("concurrency", 1)
    return row["backend"], kind, row["precision"], row["scope"], row["batch"], concurrency


def _name(key: Key) -> str:
    *words, batch, callers = key
    return f"{' '.join(words)}, batch {batch}" + (f", {callers} callers" if callers > 1 else "")


def _is_expected(key: Key, request: BenchRequest, measured: Iterable[Key]) -> bool:
    """Return whether a run with this request should have a row."""
    backend, kind, precision, scope, batch, callers = key
    names = {*request.backends}
    # A name that stands for several backends may have become other ones.
    if EVERY in names or any(len(find_backends(name)) > 1 for name in names - {ON_GPU}):
        expected = True
    elif ON_GPU in names:
        expected = kind != "cpu"
    else:  # a backend named by itself is there, or the run fails
        expected = (backend, kind) in {row[:2] for row in measured}
    return (
        expected
        and (not request.precisions or not {EVERY, precision}.isdisjoint(request.precisions))
        and scope in request.scopes
        and batch in request.batches
        and callers == (1 if scope == "device" else request.concurrency)
    )


def _pair(key: Key, old: Row, new: Row) -> RowPair:
    tolerance = max(_MIN_TOLERANCE, _STANDARD_ERRORS * math.hypot(_error(old), _error(new)))
    return RowPair(_name(key), old["p50_ms"], new["p50_ms"], tolerance)


def _error(row: Row) -> float:
    """Return the standard error of a row's median as a share of it; 0 where unknown."""
    turns = row.get("turn_p50_ms", [])
    if len(turns) < 2:
        return 0.0
    error: float = _MEDIAN_TO_MEAN * stdev(turns) / math.sqrt(len(turns)) / row["p50_ms"]
    return error


def _differences(old: Row, new: Row) -> list[str]:
    """Return the conditions of a row that are not those of the old file."""
    before, after = _conditions(old), _conditions(new)
    return [
        f"other {name}: was {before[name]}, is {after[name]}"
        for name in before
        if before[name] != after[name]
    ]


def _conditions(row: Row) -> dict[str, str]:
    machine = row.get("machine") or {}
    gpus, versions = machine.get("gpus") or [], row.get("versions") or {}
    values = {
        "device": row["device"],
        "graph": row.get("graph"),
        "images": row.get("images"),
        "number of threads": row.get("threads"),
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "GPUs": ", ".join(str(gpu.get("name")) for gpu in gpus) or "none",
        "driver": ", ".join(str(gpu.get("driver")) for gpu in gpus) or "none",
        "version": ", ".join(f"{name} {versions[name]}" for name in sorted(versions)) or "none",
    }
    return {name: _short(value) for name, value in values.items()}


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a hash
