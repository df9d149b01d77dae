"""Steps of benchmarks/gpu.sh: none stops the others, none takes longer than it may."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import gpu, gpu_steps
from benchmarks.exported import make_whole
from capt_deploy.core.driver import gpu_problem

ROOT = Path(__file__).parents[2]


def step(name: str, code: str, seconds: float = 20, **own: Any) -> gpu_steps.Step:
    return gpu_steps.Step(name, (sys.executable, "-c", code), seconds, **own)


@pytest.fixture
def report(tmp_path: Path) -> gpu.Report:
    return gpu.Report(tmp_path / "gpu.json", {"commit": "x"})


def test_a_failing_step_is_reported_and_stops_no_other(report: gpu.Report) -> None:
    own = [
        step("first", "print('[1, 2]')"),
        step("broken", "import sys; print('half'); sys.exit('no luck')"),
        step("mute", "print('no json')"),
        step("text", "print('3 passed')", as_json=False),
    ]
    gpu.run_steps(own, report, 100)
    written = json.loads(report.path.read_text())
    assert written["commit"] == "x"
    by_name = {one["name"]: one for one in written["steps"]}
    assert list(by_name) == ["first", "broken", "mute", "text"]
    assert (by_name["first"]["state"], by_name["first"]["result"]) == ("ok", [1, 2])
    assert by_name["broken"]["state"] == "exit code 1"
    assert "half" in by_name["broken"]["said"] and "no luck" in by_name["broken"]["said"]
    assert by_name["mute"]["state"].startswith("printed no JSON")
    assert (by_name["text"]["state"], by_name["text"]["said"]) == ("ok", "3 passed")


def test_a_step_that_takes_too_long_is_killed_with_what_it_started(
    report: gpu.Report, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(100)
"""
    gpu.run_steps([step("slow", code, seconds=2), step("next", "print(1)")], report, 100)
    assert [one.state for one in report.steps] == ["stopped after 2 s", "ok"]
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return False  # dead, and nobody has asked for its exit code
        time.sleep(0.1)
    return True


def test_no_step_begins_when_the_time_is_over(report: gpu.Report) -> None:
    gpu.run_steps([step("late", "print(1)")], report, 0.5)
    assert [one.state for one in report.steps] == ["no time left"]


@pytest.mark.parametrize("photos", [False, True])
def test_all_steps_together_take_less_than_eight_minutes(tmp_path: Path, photos: bool) -> None:
    own = gpu_steps.steps(tmp_path, photos=photos, engines=[*gpu_steps.ENGINES])
    assert sum(one.seconds for one in own) <= gpu.ALL_SECONDS < 480
    names = [one.name for one in own]
    assert ("train cifar100" in names) == photos
    assert {"doctor", "tests", "export", "bench", "open_clip", "train pictograms"} <= {*names}


def test_steps_without_what_they_need_do_not_run(report: gpu.Report) -> None:
    own = [
        step("export", "raise SystemExit(3)"),
        step("bench", "print(1)", needs="export"),
        step("torch", "print(1)", modules=("no_such_module",)),
        step("first", "print(1)"),
        step("second", "print(1)", needs="first"),
    ]
    gpu.run_steps(own, report, 100)
    states = [one.state for one in report.steps]
    assert states == ["exit code 3", "needs export", "needs no_such_module", "ok", "ok"]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("bench", ["export", "bench engine tensorrt", "bench"]),
        ("open_clip", ["export", "open_clip", "open_clip compiled"]),
        ("tests", ["tests"]),
        ("train", ["train pictograms"]),
    ],
)
def test_a_chosen_step_brings_what_it_needs(tmp_path: Path, only: str, names: list[str]) -> None:
    own = gpu_steps.chosen(gpu_steps.steps(tmp_path, photos=False, engines=["tensorrt"]), only)
    assert [one.name for one in own] == names


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.main, ["--only", "typo", "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "expected a part of doctor, tests, export" in result.stderr


@pytest.mark.parametrize(
    ("tests", "state", "counts"),
    [
        ("skip('x')", "nothing ran", (0, 0, 1)),
        ("pass\ndef test_b(): skip('x')", "ok", (1, 0, 1)),
        ("assert 0\ndef test_b(): pass", "exit code 1", (1, 1, 0)),
    ],
)
def test_skipped_tests_are_no_success(
    report: gpu.Report, tmp_path: Path, tests: str, state: str, counts: tuple[int, int, int]
) -> None:
    source, junit = tmp_path / "test_own.py", tmp_path / "junit.xml"
    source.write_text(f"from pytest import skip\ndef test_a(): {tests}\n")
    words = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}")
    own = gpu_steps.Step("tests", (*words, str(source)), 60, as_json=False, junit=junit)
    gpu.run_steps([own], report, 100)
    (done,) = report.steps
    assert done.state == state
    assert done.result == dict(zip(("passed", "failed", "skipped"), counts, strict=True))


def test_what_was_half_written_is_written_anew(tmp_path: Path) -> None:
    model = tmp_path / "model"

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text("all")

    def be_killed(folder: Path) -> None:
        folder.mkdir()
        (folder / "config").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_whole(model, be_killed)
    assert not model.exists()
    make_whole(model, write)
    make_whole(model, be_killed)  # not again
    assert [path.name for path in model.iterdir()] == ["weights"]
    assert list(tmp_path.iterdir()) == [model]


def test_the_tables_show_steps_latencies_and_training() -> None:
    row = {
        **{"backend": "tensorrt", "device": "cuda:0 (NVIDIA L4)", "precision": "fp16"},
        **{"scope": "host", "batch": 8, "p50_ms": 1.5, "p99_ms": 2.0, "throughput_per_s": 5333.3},
    }
    eager = {**row, "backend": "open_clip eager", "scope": "image_to_label"}
    done = [
        gpu.Done("tests", "exit code 1", 3.0, None, "1 failed"),
        gpu.Done("bench", "ok", 20.0, [row]),
        gpu.Done("open_clip", "ok", 60.0, {"ViT-B/16": {"rows": [eager]}}),
        gpu.Done("train pictograms", "ok", 30.0, {"seconds": 12.3, "harmonic": 0.8}),
    ]
    lines = [line.split() for line in gpu.text_of(done).splitlines()]
    assert ["tests", "exit", "code", "1", "3"] in lines
    assert ["tensorrt", "cuda:0", "fp16", "host", "8", "1.500", "2.000", "5333.3"] in lines
    assert any(line[:2] == ["open_clip", "eager"] for line in lines)
    assert lines[-1] == ["train", "pictograms:", "12.3", "s,", "harmonic", "0.800"]


@pytest.mark.skipif(gpu_problem() is None, reason="here is a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--out", out],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("not run on a GPU: ")
    assert not out.exists()


def test_an_interpreter_without_the_packages_is_said() -> None:
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh"],
        env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "/bin/false lacks what capt needs" in done.stderr
