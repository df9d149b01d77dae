import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capt_deploy.bench.measure import (
    BenchOptions,
    Case,
    Memory,
    Threads,
    Turn,
    has_settled,
    measure,
    summarize,
)

NOW = Memory.now()
LATENCIES = st.lists(st.floats(0.001, 1e5), min_size=1, max_size=60)
QUICK = BenchOptions(seconds=0.02, rounds=4, min_runs=8, warm_up_seconds=0.02)


class Log:
    """Cases whose every call and latency is known."""

    def __init__(self):
        self.turns = []

    def case(self, name, latency_ms=1.0, **own):
        def run(times):
            self.turns.append((name, times))
            return Turn([latency_ms] * times, times * latency_ms / 1000)

        plain = {"batch": 1, "scope": "host", "memory_before": NOW}
        return Case(name, "cpu", "fp32", run=run, **{**plain, **own})


def test_every_case_has_its_turn_in_every_round_and_each_is_first_once():
    log = Log()
    options = BenchOptions(seconds=0.8, rounds=2, warm_up_seconds=0.01)
    measure([log.case("a"), log.case("b")], options)
    measured = [turn for turn in log.turns if turn[1] > 1]
    assert measured == [("a", 400), ("b", 400), ("b", 400), ("a", 400)]


def test_a_slow_case_is_measured_a_few_times_in_some_of_the_rounds():
    log = Log()
    options = BenchOptions(seconds=0.01, rounds=10, min_runs=5, warm_up_seconds=0.01)
    (row,) = measure([log.case("slow", latency_ms=5000.0)], options)
    assert row["iterations"] == 5
    assert (row["p50_ms"], row["settled"]) == (5000.0, True)


def test_a_row_has_every_key_of_the_contract_and_its_own():
    (row,) = measure(
        [Log().case("a", 2.0, batch=8, details={"graph": "g", "versions": {"x": "1"}})], QUICK
    )
    contract = {
        *("backend", "device", "precision", "batch", "scope", "p50_ms", "p90_ms", "p99_ms"),
        *("mean_ms", "cv", "throughput_per_s", "iterations", "versions"),
    }
    assert contract <= row.keys()
    assert (row["backend"], row["batch"], row["graph"], row["concurrency"]) == ("a", 8, "g", 1)
    assert row["throughput_per_s"] == pytest.approx(8 * 1000 / 2)
    assert row["machine"]["cores"] >= 1


def test_only_measured_runs_count():
    log = Log()
    (row,) = measure([log.case("a")], QUICK)
    assert row["turn_p50_ms"] == [1.0] * QUICK.rounds
    assert row["iterations"] == 20  # 20 ms of 1 ms each
    assert sum(times for _, times in log.turns) > 20 + row["warm_up_iterations"]


def test_warming_up_ends_when_stable_or_when_its_time_is_over():
    def slowing(times):
        slowing.last *= 1.5
        time.sleep(0.001)
        return Turn([slowing.last] * times, 0.001)

    slowing.last = 1.0
    restless = Case("r", "cpu", "fp32", 1, "host", slowing, NOW)
    begun = time.monotonic()
    first, second = measure([restless, Log().case("steady")], QUICK)
    assert not first["settled"] and second["settled"]
    assert second["warm_up_iterations"] >= 10  # two windows
    assert time.monotonic() - begun < 5


def test_a_slow_first_run_costs_no_measured_ones():
    def compiled_first(times):
        first = not compiled_first.calls
        compiled_first.calls += 1
        latency = 60_000.0 if first else 1.0
        time.sleep(0.05 if first else 0.001)  # longer than all the warming up
        return Turn([latency] * times, times * latency / 1000)

    compiled_first.calls = 0
    (row,) = measure([Case("c", "cpu", "fp32", 1, "host", compiled_first, NOW)], QUICK)
    assert (row["iterations"], row["p50_ms"]) == (20, 1.0)


def test_of_a_few_slow_warm_up_runs_the_last_says_how_long_one_takes():
    def slow_twice(times):
        slow_twice.calls += 1
        time.sleep(0.03)
        latency = 1000.0 if slow_twice.calls <= 2 else 1.0
        return Turn([latency] * times, times * latency / 1000)

    slow_twice.calls = 0
    options = BenchOptions(seconds=0.02, rounds=1, warm_up_seconds=0.05)
    (row,) = measure([Case("c", "cpu", "fp32", 1, "host", slow_twice, NOW)], options)
    assert row["iterations"] == 20


def test_a_generator_loads_each_case_after_the_one_before_is_warm():
    log = Log()

    def cases():
        yield log.case("a")
        assert {name for name, _ in log.turns} == {"a"}
        yield log.case("b")

    assert [row["backend"] for row in measure(cases(), QUICK)] == ["a", "b"]


def test_memory_is_what_was_added_since_before():
    held = []

    def run(times):
        if not held:
            held.append(b"x" * 50_000_000)
        return Turn([1.0] * times, 0.001 * times)

    if NOW.resident is None:
        pytest.skip("this system does not tell how much memory a process holds")
    (row,) = measure([Case("a", "cpu", "fp32", 1, "host", run, Memory.now())], QUICK)
    assert 45e6 < row["memory_bytes"] < 90e6


@pytest.mark.parametrize("count", [1, 4])
def test_every_thread_calls_so_often_and_all_at_once(count):
    seen, lock = {}, threading.Lock()

    def call():
        with lock:
            name = threading.get_ident()
            seen[name] = seen.get(name, 0) + 1
        time.sleep(0.005)

    with Threads(count) as threads:
        turn = threads.run(call, 3)
        assert list(seen.values()) == [3] * count
        threads.run(call, 2)  # by the same threads
    assert list(seen.values()) == [5] * count
    assert len(turn.latencies_ms) == 3 * count
    assert turn.seconds >= 0.015
    if count > 1:  # they overlapped
        assert turn.seconds < sum(turn.latencies_ms) / 1000


def test_an_error_in_a_thread_reaches_the_caller():
    def fail():
        raise ValueError("in a thread")

    with Threads(3) as threads, pytest.raises(ValueError, match="in a thread"):
        threads.run(fail, 1)


def test_figures_of_a_series_that_can_be_checked_by_hand():
    summary = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (summary["p50_ms"], summary["mean_ms"], summary["iterations"]) == (3.0, 3.0, 5)
    assert summary["p90_ms"] == pytest.approx(4.6)  # 0.9 of the way from 1 to 5, in four steps
    assert summary["p95_ms"] == pytest.approx(4.8)
    assert summary["p99_ms"] == pytest.approx(4.96)
    assert summary["cv"] == pytest.approx(math.sqrt(10 / 4) / 3)


def test_a_single_run_is_every_percentile_and_varies_by_nothing():
    summary = summarize([7.0])
    assert (
        summary["p50_ms"],
        summary["p90_ms"],
        summary["p95_ms"],
        summary["p99_ms"],
        summary["mean_ms"],
    ) == (7.0,) * 5
    assert (summary["cv"], summary["iterations"]) == (0.0, 1)


@given(LATENCIES)
def test_percentiles_are_numpys_and_in_order(latencies):
    summary = summarize(latencies)
    shares = {"p50_ms": 50, "p90_ms": 90, "p95_ms": 95, "p99_ms": 99}
    for name, share in shares.items():
        assert summary[name] == pytest.approx(np.percentile(latencies, share))
    assert (
        summary["p50_ms"]
        <= summary["p90_ms"]
        <= summary["p95_ms"]
        <= summary["p99_ms"]
        <= max(latencies) * (1 + 1e-12)
    )
    assert summary["cv"] >= 0


@pytest.mark.parametrize(
    ("latencies", "settled"),
    [
        ([], False),
        ([1.0] * 9, False),  # too few to compare two windows
        ([1.0] * 10, True),
        ([9.0] * 5 + [1.0] * 5, False),
        ([9.0] * 5 + [1.0] * 10, True),  # only the last two windows count
        ([1.0] * 5 + [1.04] * 5, True),
        ([1.0] * 5 + [1.06] * 5, False),
        ([1.06] * 5 + [1.0] * 5, False),
        ([1.0] * 5 + [1.0, 50.0, 1.0, 50.0, 1.0], True),  # slow runs that are no trend
    ],
)
def test_a_series_has_settled_once_two_windows_have_the_same_median(latencies, settled):
    assert has_settled(latencies, window=5, tolerance=0.05) is settled
