"""Measure cases side by side: warm each up until it is stable, then measure all in turns.

Clocks, heat and other programs change while one measures, and would favour the first or the last
case. So every case has a turn in every round, and each round begins with another case.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from threading import Barrier
from typing import Any, NamedTuple

import numpy as np

from capt_deploy.core.console import progress
from capt_deploy.core.machine import describe_machine, gpu_memory_used, resident_memory

SCOPES = ("device", "host", "image_to_label")
ENOUGH_FOR_P99 = 100  # with fewer runs, the 99th percentile lies between the two slowest
# The first run after another case finds that case's data in the caches and its threads spinning.
# It is repeated, unless a run takes longer than this.
_SHORT_MS = 250.0


@dataclass(frozen=True)
class BenchOptions:
    """How long to measure, and in how many turns."""

    seconds: float = 2.0  # of measuring, for each case
    rounds: int = 10
    min_runs: int = 5  # of a case, however slow it is
    warm_up_seconds: float = 3.0  # at most, after the first run
    window: int = 5  # runs whose medians are compared while warming up
    tolerance: float = 0.05  # share by which these medians may differ


class Turn(NamedTuple):
    """Some runs of a case."""

    latencies_ms: list[float]  # of each run
    seconds: float  # of all runs together; less than the sum of latencies where threads overlap


@dataclass(frozen=True)
class Memory:
    """Bytes in use at a moment; None where unknown."""

    resident: int | None  # of this process
    gpu: int | None  # of all GPUs, by all programs

    @classmethod
    def now(cls) -> "Memory":
        """Read both."""
        return cls(resident_memory(), gpu_memory_used())


@dataclass(frozen=True)
class Case:
    """A row to measure."""

    backend: str
    device: str
    precision: str
    batch: int
    scope: str  # one of SCOPES
    run: Callable[[int], Turn]  # lets every thread run the case that many times
    memory_before: Memory  # before the case was loaded
    concurrency: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)  # further keys of the row


class Threads(ThreadPoolExecutor):
    """Threads that call a function at once.

    The same threads serve every turn: backends keep a context for each thread, and new threads
    would measure how long that takes to make.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count

    def run(self, call: Callable[[], object], iterations: int) -> Turn:
        """Let every thread call `iterations` times, all starting at the same moment."""
        barrier = Barrier(self.count)

        def clock() -> tuple[float, float, list[float]]:
            latencies_ms = []
            barrier.wait()
            start = time.perf_counter()
            for _ in range(iterations):
                before = time.perf_counter_ns()
                call()
                latencies_ms.append((time.perf_counter_ns() - before) / 1e6)
            return start, time.perf_counter(), latencies_ms

        if self.count == 1:
            parts = [clock()]
        else:
            futures = [self.submit(clock) for _ in range(self.count)]
            parts = [future.result() for future in futures]
        starts, ends, latencies = zip(*parts, strict=True)
        return Turn([value for part in latencies for value in part], max(ends) - min(starts))


def measure(cases: Iterable[Case], options: BenchOptions) -> list[dict[str, Any]]:
    """Measure cases and return their rows, in order.

    Each case is warmed up before the next is drawn from the iterable. A generator can thus load
    each case just before it is used, and each row says how much memory that took.
    """
    measurements = [_Measurement(case, options) for case in cases]
    if not measurements:
        return []
    with progress("measuring", options.rounds, "rounds") as counter:
        for number in range(options.rounds):
            first = number % len(measurements)
            for measurement in measurements[first:] + measurements[:first]:
                measurement.take_turn(number)
            counter.advance()
    machine = describe_machine()  # now, while the clocks are still those of the measurement
    return [{**measurement.row(), "machine": machine} for measurement in measurements]


class _Measurement:
    """A warm case and its latencies."""

    def __init__(self, case: Case, options: BenchOptions) -> None:
        self._case, self._rounds = case, options.rounds
        warm_up, self._settled = _warm_up(case, options)
        self._warm_up_runs = len(warm_up) + case.concurrency  # and the first runs
        # Of a few runs, those before the last may still have been slow.
        windows = (warm_up[-runs * case.concurrency :] for runs in (options.window, 1))
        self._typical_ms = min(map(median, windows))
        runs = round(1000 * options.seconds / max(self._typical_ms, 1e-3))
        self._runs = max(options.min_runs, runs)  # of every thread
        self._memory = Memory.now()
        self._latencies: list[float] = []
        self._turn_p50_ms: list[float] = []
        self._seconds = 0.0

    def take_turn(self, number: int) -> None:
        """Measure this round's share of the runs; slow cases sit some rounds out."""
        share = self._runs * (number + 1) // self._rounds - self._runs * number // self._rounds
        if not share:
            return
        if self._typical_ms < _SHORT_MS:
            self._case.run(1)
        turn = self._case.run(share)
        self._latencies += turn.latencies_ms
        self._turn_p50_ms.append(median(turn.latencies_ms))
        self._seconds += turn.seconds

    def row(self) -> dict[str, Any]:
        """Return the row with the keys that `capt-bench --json` prints."""
        case, before = self._case, self._case.memory_before
        return {
            "backend": case.backend,
            "device": case.device,
            "precision": case.precision,
            "batch": case.batch,
            "scope": case.scope,
            "concurrency": case.concurrency,
            **summarize(self._latencies),
            "turn_p50_ms": self._turn_p50_ms,
            "throughput_per_s": case.batch * len(self._latencies) / self._seconds,
            "warm_up_iterations": self._warm_up_runs,
            "settled": self._settled,
            "memory_bytes": _growth(before.resident, self._memory.resident),
            "gpu_memory_bytes": _growth(before.gpu, self._memory.gpu),
            **case.details,
        }


def _warm_up(case: Case, options: BenchOptions) -> tuple[list[float], bool]:
    """Run a case until it is stable or time is over; return its latencies and whether it is stable.

    The first run may compile, build or load, and is left out.
    """
    case.run(1)
    start = time.monotonic()
    latencies: list[float] = []
    while True:
        latencies += case.run(1).latencies_ms
        settled = has_settled(latencies, options.window * case.concurrency, options.tolerance)
        seconds = time.monotonic() - start
        # A GPU takes a while to leave its lowest clocks, at which short runs look stable.
        enough = options.warm_up_seconds / 10 if settled else options.warm_up_seconds
        if seconds >= enough:
            return latencies, settled


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


def summarize(latencies_ms: Sequence[float]) -> dict[str, Any]:
    """Return percentiles, which interpolate linearly, mean, coefficient of variation and count."""
    values = np.asarray(latencies_ms, dtype=np.float64)
    percentiles = {f"p{q}_ms": float(np.percentile(values, q)) for q in (50, 90, 95, 99)}
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    cv = deviation / mean if mean else 0.0
    return {**percentiles, "mean_ms": mean, "cv": cv, "iterations": len(values)}


def has_settled(latencies_ms: Sequence[float], window: int, tolerance: float) -> bool:
    """Return whether a case is warm.

    It is when the medians of the last `window` runs and of the `window` before them differ by no
    more than `tolerance`, a share. A single slow run moves no median; a trend moves both.
    """
    if len(latencies_ms) < 2 * window:
        return False
    before = median(latencies_ms[-2 * window : -window])
    return abs(median(latencies_ms[-window:]) - before) <= tolerance * before
