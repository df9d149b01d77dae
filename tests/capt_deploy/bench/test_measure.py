import threading
import time

import pytest

from capt_deploy.bench.measure import BenchOptions, Case, Memory, Threads, Turn, measure

NOW = Memory.now()
QUICK = BenchOptions(seconds=0.02, rounds=4, least=8, warm_up_seconds=0.02)


class Log:
    """Cases whose every call and latency is known."""

    def __init__(self):
        self.turns = []

    def case(self, name, latency_ms=1.0, **own):
        def run(times):
            self.turns.append((name, times))
            return Turn([latency_ms] * times, times * latency_ms / 1000)

        plain = {"batch": 1, "scope": "host", "versions": {"x": "1"}, "memory_before": NOW}
        return Case(name, "cpu", "fp32", run=run, **{**plain, **own})


def test_every_case_has_its_turn_in_every_round_and_each_is_first_once():
    log = Log()
    options = BenchOptions(seconds=0.8, rounds=2, warm_up_seconds=0.01)
    measure([log.case("a"), log.case("b")], options)
    measured = [turn for turn in log.turns if turn[1] > 1]
    assert measured == [("a", 400), ("b", 400), ("b", 400), ("a", 400)]


def test_a_slow_case_is_measured_a_few_times_in_some_of_the_rounds():
    log = Log()
    options = BenchOptions(seconds=0.01, rounds=10, least=5, warm_up_seconds=0.01)
    (row,) = measure([log.case("slow", latency_ms=5000.0)], options)
    assert row["iterations"] == 5
    assert (row["p50_ms"], row["settled"]) == (5000.0, True)


def test_a_row_has_every_key_of_the_contract_and_its_own():
    (row,) = measure([Log().case("a", 2.0, batch=8, details={"graph": "g"})], QUICK)
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
    restless = Case("r", "cpu", "fp32", 1, "host", slowing, {}, NOW)
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
    (row,) = measure([Case("c", "cpu", "fp32", 1, "host", compiled_first, {}, NOW)], QUICK)
    assert (row["iterations"], row["p50_ms"]) == (20, 1.0)


def test_of_a_few_slow_warm_up_runs_the_last_says_how_long_one_takes():
    def slow_twice(times):
        slow_twice.calls += 1
        time.sleep(0.03)
        latency = 1000.0 if slow_twice.calls <= 2 else 1.0
        return Turn([latency] * times, times * latency / 1000)

    slow_twice.calls = 0
    options = BenchOptions(seconds=0.02, rounds=1, warm_up_seconds=0.05)
    (row,) = measure([Case("c", "cpu", "fp32", 1, "host", slow_twice, {}, NOW)], options)
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
    (row,) = measure([Case("a", "cpu", "fp32", 1, "host", run, {}, Memory.now())], QUICK)
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
