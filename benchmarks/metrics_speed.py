"""What the metrics take for as many images as a large test set has: time and memory, on one core.

    python -m benchmarks.metrics_speed

Each case has a process of its own, of which the most memory that was ever resident is told, with
the interpreter and the input. The probabilities are random; making them is not timed.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.record import describe, load_average, write_result
from capt_deploy.core.console import Command, say, table
from capt_deploy.metrics.bootstrap import metric_intervals
from capt_deploy.metrics.calibration import all_metrics
from capt_deploy.metrics.reliability import calibrated_ece, classwise_reliability, risk_coverage

_ROUNDS = 5
_ROWS = 10_000  # made at a time, so that making them takes less memory than measuring them
_Measured = Callable[[NDArray[np.float32], NDArray[np.int64]], object]


@dataclass(frozen=True)
class Case:
    """What is measured of how many probabilities."""

    function: str
    images: int
    classes: int = 100
    sharpness: float = 3.0  # of the random logits, their standard deviation


_FUNCTIONS: Mapping[str, _Measured] = {
    "all_metrics": all_metrics,
    "metric_intervals": metric_intervals,
    "classwise_reliability": classwise_reliability,
    "risk_coverage": risk_coverage,
    "calibrated_ece": lambda probabilities, _: calibrated_ece(probabilities),
}
CASES = (
    Case("all_metrics", 1_000_000),
    Case("all_metrics", 1_000_000, sharpness=0.3),  # nobody is confident: all in the first bin
    Case("all_metrics", 100_000, 1000),
    Case("classwise_reliability", 1_000_000),
    Case("risk_coverage", 1_000_000),
    Case("metric_intervals", 10_000),
    Case("calibrated_ece", 10_000),
)


@click.command(cls=Command)
@click.option("--case", "one", hidden=True)
def main(one: str | None) -> None:
    """Measure, print and write results/metrics_speed.json."""
    if one is not None:
        click.echo(json.dumps(measure(Case(**json.loads(one)))))
        return
    load, rows = load_average(), []
    for case in CASES:
        rows.append({**asdict(case), **_in_own_process(case)})
        say(f"{case.function}, {case.images} images: {rows[-1]['seconds']:.2f} s")
    write_result("metrics_speed", {**describe(), "load_before": load, "rows": rows})
    click.echo(_table(rows))


def measure(case: Case) -> dict[str, Any]:
    """Return seconds of each round, and the most memory of this process in bytes."""
    probabilities, labels = made(case)
    function, times = _FUNCTIONS[case.function], []
    before = _peak()
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        function(probabilities, labels)
        times.append(time.perf_counter() - start)
    return {
        "seconds": median(times),
        "slowest_seconds": max(times),
        "rounds": _ROUNDS,
        "input_bytes": probabilities.nbytes + labels.nbytes,
        "peak_bytes": _peak(),
        "peak_bytes_before": before,
    }


def made(case: Case, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return float32 probabilities and random labels."""
    random = np.random.default_rng(seed)
    probabilities = np.empty((case.images, case.classes), np.float32)
    for start in range(0, case.images, _ROWS):
        part = probabilities[start : start + _ROWS]
        random.standard_normal(out=part, dtype=np.float32)
        np.exp(part * np.float32(case.sharpness), out=part)
        part /= part.sum(axis=1, keepdims=True)
    return probabilities, random.integers(0, case.classes, case.images)


def _in_own_process(case: Case) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.metrics_speed", "--case", json.dumps(asdict(case))]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=alone)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB, as Linux counts


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("", "images", "classes", "sharpness", "seconds", "slowest", "input, MB", "peak, MB")
    lines = []
    for row in rows:
        size = (f"{row['images']:,}", f"{row['classes']:,}", f"{row['sharpness']:g}")
        times = (f"{row['seconds']:.2f}", f"{row['slowest_seconds']:.2f}")
        memory = (f"{row['input_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}")
        lines.append((row["function"], *size, *times, *memory))
    return table(header, lines)


if __name__ == "__main__":
    main()
