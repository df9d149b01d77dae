"""Measure several cases side by side: warmed up until stable, then in turns.

What changes while one measures (clocks, heat, other programs) would favour whoever comes first or
last. So every case has a turn in every round, and every round begins with another one.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from statistics import median
from threading import Barrier
from types import TracebackType
from typing import Any, NamedTuple

from capt_deploy.bench.statistics import has_settled, summarize
from capt_deploy.core.console import progress
from capt_deploy.core.machine import describe_machine, gpu_memory_used, resident_memory

SCOPES = ("device", "host", "image_to_label")


@dataclass(frozen=True)
class BenchOptions:
    """How long, and in how many turns."""

    seconds: float = 2.0  # of measuring, for each case
    rounds: int = 10
    least: int = 5  # runs of a case, however slow it is
    warm_up_seconds: float = 3.0  # at most, after the first run; one more is always taken
    window: int = 5  # runs whose medians are compared while warming up
    tolerance: float = 0.05  # share by which these may differ


class Turn(NamedTuple):
    """Some runs of a case."""

    latencies_ms: list[float]  # of each
    seconds: float  # in which they were done; shorter than their sum where threads overlap


@dataclass(frozen=True)
class Memory:
    """What was in use at a moment; None where it cannot be found out."""

    resident: int | None  # bytes of this process
    gpu: int | None  # bytes of all GPUs, by everybody

    @classmethod
    def now(cls) -> "Memory":
        """Read both."""
        return cls(resident_memory(), gpu_memory_used())


@dataclass(frozen=True)
class Case:
    """One row to come."""

    backend: str
    device: str
    precision: str
    batch: int
    scope: str  # one of SCOPES
    run: Callable[[int], Turn]  # so many times, by every thread
    versions: Mapping[str, str]
    memory_before: Memory  # before anything of it was loaded
    concurrency: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)  # further keys of the row


class Threads:
    """So many threads that call the same thing at once; the same ones for every turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Backends keep a context for each thread: new threads in each turn would measure that.
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, call: Callable[[], object], iterations: int) -> Turn:
        """Let every thread call `iterations` times, clocked from the moment when all are there."""
        if self._pool is None:
            start = time.perf_counter()
            latencies = _clock(call, iterations)
            return Turn(latencies, time.perf_counter() - start)
        together = Barrier(self.count)
        done = [self._pool.submit(_together, call, iterations, together) for _ in range(self.count)]
        parts = [one.result() for one in done]
        begun, ended = min(part[0] for part in parts), max(part[1] for part in parts)
        return Turn([latency for part in parts for latency in part[2]], ended - begun)


def _together(
    call: Callable[[], object], iterations: int, together: Barrier
) -> tuple[float, float, list[float]]:
    together.wait()
    start = time.perf_counter()
    latencies = _clock(call, iterations)
    return start, time.perf_counter(), latencies


def _clock(call: Callable[[], object], iterations: int) -> list[float]:
    latencies = []
    for _ in range(iterations):
        start = time.perf_counter_ns()
        call()
        latencies.append((time.perf_counter_ns() - start) / 1e6)
    return latencies


def measure(cases: Iterable[Case], options: BenchOptions) -> list[dict[str, Any]]:
    """Measure cases and return their rows, in order.

    Args:
        cases: each is warmed up before the next is asked for, so that a generator may load what it
            needs just before and each row can say how much memory that took.
        options: of all.
    """
    started = [_Started.warmed_up(case, options) for case in cases]
    if not started:
        return []
    with progress("measuring", options.rounds, "rounds") as counter:
        for number in range(options.rounds):
            first = number % len(started)
            for one in started[first:] + started[:first]:
                one.take_turn(number)
            counter.advance()
    machine = describe_machine()  # now, while the clocks are still those of the measurement
    return [{**one.row(), "machine": machine} for one in started]


class _Started:
    """A case that is warm, with what was measured of it so far."""

    # The first run after another case finds that one's data in the caches and its threads still
    # spinning. For longer runs than this it is not worth another run.
    _SHORT_MS = 250.0

    def __init__(
        self, case: Case, options: BenchOptions, warm_up: list[float], settled: bool
    ) -> None:
        self.case, self._options, self._settled = case, options, settled
        self._warm_up = len(warm_up) + case.concurrency  # and the first runs
        # The last runs as well: where there are few, those before may still have been slow.
        last = (median(warm_up[-count * case.concurrency :]) for count in (options.window, 1))
        self._typical_ms = min(last)
        self._memory = Memory.now()
        turns = round(1000 * options.seconds / max(self._typical_ms, 1e-3))
        self._wanted = max(options.least, turns)  # by every thread
        self._latencies: list[float] = []
        self._turn_p50_ms: list[float] = []
        self._seconds = 0.0

    @classmethod
    def warmed_up(cls, case: Case, options: BenchOptions) -> "_Started":
        """Run a case until it has settled, or its time is over.

        The first run may compile, build or load: it says nothing of the others, whatever it took.
        """
        case.run(1)
        start = time.monotonic()
        series: list[float] = []
        settled = False
        # A GPU takes a while to leave its lowest clocks, in which short runs look stable.
        while not (settled and time.monotonic() - start >= options.warm_up_seconds / 10):
            series += case.run(1).latencies_ms
            settled = has_settled(series, options.window * case.concurrency, options.tolerance)
            if time.monotonic() - start >= options.warm_up_seconds:
                break
        return cls(case, options, series, settled)

    def take_turn(self, number: int) -> None:
        """Do this round's share of the runs; slow cases sit some rounds out."""
        rounds = self._options.rounds
        share = self._wanted * (number + 1) // rounds - self._wanted * number // rounds
        if not share:
            return
        if self._typical_ms < self._SHORT_MS:
            self.case.run(1)
        turn = self.case.run(share)
        self._latencies += turn.latencies_ms
        self._turn_p50_ms.append(median(turn.latencies_ms))
        self._seconds += turn.seconds

    def row(self) -> dict[str, Any]:
        """Return the row; shapes of its keys are DESIGN's."""
        case, before = self.case, self.case.memory_before
        return {
            "backend": case.backend,
            "device": case.device,
            "precision": case.precision,
            "batch": case.batch,
            "scope": case.scope,
            "concurrency": case.concurrency,
            **asdict(summarize(self._latencies)),
            "turn_p50_ms": self._turn_p50_ms,
            "throughput_per_s": case.batch * len(self._latencies) / self._seconds,
            "warm_up_iterations": self._warm_up,
            "settled": self._settled,
            "memory_bytes": _grown(before.resident, self._memory.resident),
            "gpu_memory_bytes": _grown(before.gpu, self._memory.gpu),
            **case.details,
            "versions": dict(case.versions),
        }


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)
