import copy
import json
from statistics import stdev

import numpy as np
import pytest

from capt_deploy.bench.cases import BenchRequest
from capt_deploy.bench.compare import compare_rows, load_rows
from capt_deploy.bench.measure import summarize
from capt_deploy.core.errors import ConfigError


def row(p50=10.0, cv=0.01, iterations=400, **own):
    plain = {
        *(("backend", "onnxruntime"), ("device", "cpu"), ("precision", "fp32"), ("batch", 1)),
        *(("scope", "host"), ("p50_ms", p50), ("cv", cv), ("iterations", iterations)),
    }
    machine = {"cpu": "one", "cores": 2, "gpus": []}
    return {**dict(plain), "versions": {"capt": "1"}, "machine": machine, **own}


def verdict(old, new):
    (pair,) = compare_rows([old], [new]).pairs
    return pair.verdict


@pytest.mark.parametrize(
    ("p50", "expected"),
    [(10.9, "same"), (11.1, "slower"), (9.2, "same"), (9.0, "faster"), (10.0, "same")],
)
def test_ten_percent_are_allowed_where_turns_are_alike_or_unknown(p50, expected):
    assert verdict(row(), row(p50)) == expected
    assert verdict(row(cv=5.0, iterations=5), row(p50)) == expected  # runs say nothing of it
    assert verdict(row(turn_p50_ms=[10.0] * 10), row(p50, turn_p50_ms=[p50] * 10)) == expected


def test_where_turns_differ_more_is_allowed():
    turns = [8.0, 12.0] * 5
    error = 1.25 * stdev(turns) / 10**0.5 / 10  # 8.3 %
    (pair,) = compare_rows([row(turn_p50_ms=turns)], [row(12.4)]).pairs
    assert (pair.tolerance, pair.verdict) == (pytest.approx(3 * error), "same")
    assert verdict(row(turn_p50_ms=turns), row(12.6)) == "slower"
    (pair,) = compare_rows([row(turn_p50_ms=turns)], [row(turn_p50_ms=turns)]).pairs
    assert pair.tolerance == pytest.approx(3 * error * 2**0.5)


def test_what_is_too_unsteady_is_unclear():
    wild = row(turn_p50_ms=[5.0, 15.0] * 5)  # 62 %
    comparison = compare_rows([wild], [row(16.0)])
    assert comparison.pairs[0].verdict == "unclear" and not comparison.failed
    assert "1 row too unsteady to be judged" in str(comparison)
    assert verdict(wild, row(16.5)) == "slower"  # beyond even that
    assert "too unsteady" not in str(compare_rows([row()], [row()]))


def test_runs_of_a_machine_with_slow_spells_are_the_same():
    """Latencies come in spells of 30 runs that differ by a fifth, as beside other programs."""
    random = np.random.default_rng(0)

    def one_run():
        spells = random.normal(10.0, 2.0, 20).repeat(30)
        latencies = spells * random.normal(1, 0.02, 600)
        summary = summarize(latencies)
        turns = [float(np.median(turn)) for turn in latencies.reshape(10, 60)]
        return row(summary["p50_ms"], summary["cv"], 600, turn_p50_ms=turns)

    verdicts = [verdict(one_run(), one_run()) for _ in range(200)]
    assert verdicts.count("slower") + verdicts.count("faster") < 10


def test_one_slower_row_is_a_regression_whatever_the_others_are():
    old, new = [row(), row(batch=8)], [row(5.0), row(20.0, batch=8)]
    comparison = compare_rows(old, new)
    assert comparison.failed
    assert [pair.verdict for pair in comparison.pairs] == ["faster", "slower"]
    assert "2 rows compared: 1 slower, 0 missing" in str(comparison)


@pytest.mark.parametrize(
    ("requested", "missing"),
    [
        (None, 4),
        (BenchRequest(("all",), (), (1, 8)), 4),
        (BenchRequest(("all",), (), (1,)), 3),
        (BenchRequest(("all",), (), (1,), ("host",)), 2),
        (BenchRequest(("all",), ("fp16", "fp32"), (1,), ("host",)), 2),
        (BenchRequest(("all",), ("fp32",), (1,), ("host",)), 0),
        (BenchRequest(("gpu",), (), (1,), ("host",)), 1),
        (BenchRequest(("auto",), (), (1,), ("host",)), 2),
        (BenchRequest(("onnxruntime-cpu",), (), (1,), ("host",)), 1),  # of its other graph
        (BenchRequest(("all",), (), (1,), ("device",), concurrency=4), 1),
    ],
)
def test_a_row_that_should_be_there_is_missed(requested, missing):
    gpu = {"backend": "tensorrt", "device": "cuda:0 (L4)", "precision": "fp16"}
    old = [row(), row(**gpu), row(precision="fp16"), row(batch=8), row(**gpu, scope="device")]
    comparison = compare_rows(old, [row()], requested)
    assert (len(comparison.missing), len(comparison.only_old)) == (missing, 4 - missing)
    assert (comparison.failed, comparison.count("slower")) == (missing > 0, 0)
    assert f"1 row compared: 0 slower, {missing} missing" in str(comparison)
    assert str(comparison).count("missing in this run") == missing
    assert all(name in str(comparison) for name in comparison.missing)


def test_rows_without_a_partner_are_listed():
    old = [row(), row(batch=8), row(scope="image_to_label")]
    new = [row(), row(concurrency=4), row(precision="int8")]
    comparison = compare_rows(old, new, BenchRequest(("all",), (), (1,), ("host",)))
    assert len(comparison.pairs) == 1
    assert comparison.only_old == (
        "onnxruntime cpu fp32 host, batch 8",
        "onnxruntime cpu fp32 image_to_label, batch 1",
    )
    assert comparison.only_new == (
        "onnxruntime cpu fp32 host, batch 1, 4 callers",
        "onnxruntime cpu int8 host, batch 1",
    )
    assert all(name in str(comparison) for name in (*comparison.only_old, *comparison.only_new))


def test_nothing_in_common_is_no_verdict():
    with pytest.raises(ConfigError, match="no row in common"):
        compare_rows([row()], [row(batch=8)])


def test_another_gpu_is_compared_and_said():
    old = row(device="cuda:0 (NVIDIA A10)", machine={"gpus": [{"name": "A10", "driver": "1"}]})
    new = row(device="cuda:0 (NVIDIA L4)", machine={"gpus": [{"name": "L4", "driver": "2"}]})
    said = compare_rows([old], [new]).differences
    assert said == (
        "other device: was cuda:0 (NVIDIA A10), is cuda:0 (NVIDIA L4)",
        "other GPUs: was A10, is L4",
        "other driver: was 1, is 2",
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("versions", {"capt": "2"}, "other version: was capt 1, is capt 2"),
        ("threads", 2, "other number of threads: was unknown, is 2"),
        ("images", "5 of photos", "other images: was unknown, is 5 of photos"),
        ("graph", "a" * 64, "other graph: was unknown, is aaaaaaaaaaaa…"),
        ("machine", {"cpu": "two", "cores": 2, "gpus": []}, "other processor: was one, is two"),
        ("machine", None, "other processor: was one, is unknown"),
    ],
)
def test_other_conditions_are_said_once(key, value, said):
    old, new = [row(), row(batch=8)], [row(**{key: value}), row(batch=8, **{key: value})]
    assert compare_rows(old, new).differences.count(said) == 1
    assert compare_rows(old, copy.deepcopy(old)).differences == ()


@pytest.mark.parametrize(
    "content",
    [
        "nothing",
        "[]",
        "{}",
        "[1]",
        json.dumps([{**row(), "p50_ms": 0}]),
        json.dumps([{**row(), "p50_ms": "fast"}]),
        json.dumps([{**row(), "p50_ms": float("nan")}]),
        json.dumps([{**row(), "batch": 0}]),
        json.dumps([{**row(), "device": None}]),
        json.dumps([{**row(), "concurrency": [1]}]),
        json.dumps([{**row(), "concurrency": None}]),
        json.dumps([{**row(), "turn_p50_ms": "fast"}]),
    ],
)
def test_what_is_no_list_of_rows_is_refused(tmp_path, content):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"old\.json"):
        load_rows(path)


def test_rows_with_the_keys_of_the_contract_alone_are_enough(tmp_path):
    bare = {key: value for key, value in row().items() if key not in ("versions", "machine")}
    path = tmp_path / "old.json"
    path.write_text(json.dumps([bare]))
    assert not compare_rows(load_rows(path), [row()]).failed
