import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.cli.bench import _print_table, main
from capt_deploy.core.gpus import gpu_problem
from capt_deploy.core.machine import usable_cores

GOLDEN = Path(__file__).parents[2] / "golden"
BUNDLE = GOLDEN / "tiny.capt"
QUICK = ("--seconds", 0.05)


def run(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def measured():
    """Return what a quick run prints as JSON."""
    result = run(BUNDLE, "--batch", "1,3", *QUICK, "--json", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    return result


def test_json_is_a_list_with_a_row_for_every_batch_and_scope(measured):
    rows = json.loads(measured.stdout)
    assert [(row["scope"], row["batch"]) for row in rows] == [
        *(("host", 1), ("host", 3), ("image_to_label", 1), ("image_to_label", 3)),
    ]
    for row in rows:
        assert (row["backend"], row["device"], row["precision"]) == ("onnxruntime", "cpu", "fp32")
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["throughput_per_s"] > 0 and row["cv"] >= 0 and row["iterations"] >= 5
        assert row["versions"]["numpy"] and row["machine"]["cores"] >= 1
        assert row["threads"] == usable_cores() and row["queued"] is None
        assert row["images"] == "synthetic 500x375" and len(row["graph"]) == 64


def test_what_cannot_be_measured_is_said(measured):
    assert "left out device times of onnxruntime on cpu" in measured.stderr


def test_the_table_marks_what_was_measured_too_seldom():
    photos = GOLDEN / "photos"
    options = ("--batch", 2, "--scope", "image_to_label", "--concurrency", 2, "--images", photos)
    result = run(BUNDLE, *options, "--seconds", 0.001)
    assert result.exit_code == 0, result.output
    _, _, line = result.stdout.splitlines()
    cells = line.split()
    assert cells[:6] == ["onnxruntime", "cpu", "fp32", "image_to_label", "2", "2"]
    assert cells[9].endswith("*")
    assert "fewer than 100 runs" in result.stderr


def test_device_times_of_two_kinds_are_told_apart(measured, capsys):
    row = json.loads(measured.stdout)[0]
    for others, said in (((True, None), False), ((True, False), True)):
        _print_table([{**row, "queued": queued} for queued in others])
        assert ("runs are queued" in capsys.readouterr().err) is said


def test_a_run_is_compared_with_an_earlier_one(measured, tmp_path):
    rows = json.loads(measured.stdout)
    arguments = (BUNDLE, "--batch", "1", "--scope", "host", *QUICK, "--compare")
    for factor, code, said in (
        (1e6, 0, "1 row compared: 0 slower, 0 missing"),
        (1e-6, 1, "1 row compared: 1 slower, 0 missing"),
    ):
        old = tmp_path / "old.json"
        changed = [{**row, "p50_ms": row["p50_ms"] * factor, "cv": 0.0} for row in rows]
        old.write_text(json.dumps(changed))
        result = run(*arguments, old)
        assert (result.exit_code, said in result.stdout) == (code, True), result.output
        assert "only in the old file: onnxruntime cpu fp32 image_to_label" in result.stdout


def test_a_backend_that_is_gone_is_no_success(measured, tmp_path):
    rows = [{**row, "p50_ms": row["p50_ms"] * 1e6} for row in json.loads(measured.stdout)]
    gone = {"backend": "tensorrt", "device": "cuda:0 (NVIDIA L4)"}
    old = tmp_path / "old.json"
    old.write_text(json.dumps([*rows, {**rows[0], **gone}]))
    options = ("--batch", 1, "--scope", "host", "--compare", old, "--backend")
    result = run(BUNDLE, *options, "all", *QUICK)
    assert result.exit_code == 1, result.output
    assert "missing in this run: tensorrt cuda fp32 host, batch 1" in result.stdout
    assert run(BUNDLE, *options, "onnxruntime-cpu", *QUICK).exit_code == 0


def test_json_stays_json_when_runs_are_compared(measured, tmp_path):
    old = tmp_path / "old.json"
    old.write_text(measured.stdout)
    options = ("--batch", 1, "--scope", "host", "--compare", old, "--json")
    result = run(BUNDLE, *options, *QUICK)
    assert len(json.loads(result.stdout)) == 1
    assert "1 row compared" in result.stderr


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    result = run(BUNDLE, "--batch", 1, "--scope", "host", *QUICK, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path):
    code = f"""
import sys
sys.modules["matplotlib"] = None
from capt_deploy.cli.bench import main
from capt_deploy.core.gpus import gpu_problem
main({[str(BUNDLE), "--plot", str(tmp_path / "x.png")]})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install '.[plot]'" in done.stderr
    assert "Traceback" not in done.stderr and "measuring" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.capt",), "no such bundle"),
        ((BUNDLE, "--backend", "magic"), "expected one of"),
        ((BUNDLE, "--backend", ","), "at least one"),
        ((BUNDLE, "--batch", "0"), "from 1 on"),
        ((BUNDLE, "--batch", "1,x"), "from 1 on, came x"),
        ((BUNDLE, "--scope", "kernel"), "expected of device, host, image_to_label"),
        ((BUNDLE, "--scope", "device", "--backend", "onnxruntime"), "no row is left"),
        ((BUNDLE, "--precision", "fp64"), "no 'fp64' graph"),
        ((BUNDLE, "--seconds", "0"), "--seconds"),
        ((BUNDLE, "--seconds", "nan"), "expected a number of seconds, came nan"),
        ((BUNDLE, "--seconds", "inf"), "expected a number of seconds, came inf"),
        ((BUNDLE, "--concurrency", "0"), "--concurrency"),
        ((BUNDLE, "--images", "nowhere"), "nowhere"),
        ((BUNDLE, "--images", GOLDEN / "tiny.capt"), "holds no image"),
        ((BUNDLE, "--compare", "nowhere.json"), "expected a readable JSON file"),
        ((BUNDLE, "--compare", BUNDLE / "manifest.json"), "capt-bench --json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_all_backends_are_tried_and_those_that_do_not_run_are_said():
    result = run(BUNDLE, "--backend", "all", "--batch", 1, "--scope", "host", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert "cpu" in [row["device"] for row in rows]
    assert len({(row["backend"], row["device"]) for row in rows}) == len(rows)


def test_two_names_of_one_backend_are_measured_once():
    options = ("--backend", "onnxruntime,onnxruntime-cpu", "--batch", 1, "--scope", "host")
    result = run(BUNDLE, *options, *QUICK, "--json")
    backends = [(row["backend"], row["device"]) for row in json.loads(result.stdout)]
    assert backends == list(dict.fromkeys(backends))
    if backends == [("onnxruntime", "cpu")]:
        assert "left out onnxruntime-cpu: it is onnxruntime here, on cpu" in result.stderr


@pytest.mark.skipif(gpu_problem() is None, reason="here is a GPU")
def test_without_a_gpu_there_is_no_backend_on_one():
    result = run(BUNDLE, "--backend", "gpu", "--batch", 1, *QUICK)
    assert result.exit_code == 2
    assert "capt-doctor says why" in result.stderr
    assert result.stderr.count("left out ") == 3


def test_all_precisions_of_a_lone_graph_are_its_own():
    options = ("--precision", "all", "--batch", 1, "--scope", "host", "--backend", "onnxruntime")
    for path in (BUNDLE, BUNDLE / "model.onnx"):
        (row,) = json.loads(run(path, *options, *QUICK, "--json").stdout)
        assert row["precision"] == "fp32"
        assert len(row["graph"]) == 64
