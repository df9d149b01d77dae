"""Steps of benchmarks/gpu.sh: none stops the others, none takes longer than it may."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_steps
from capt_deploy.backends.spec import BACKENDS
from capt_deploy.core.gpus import gpu_problem

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
    assert "half" in by_name["broken"]["output"] and "no luck" in by_name["broken"]["output"]
    assert by_name["mute"]["state"].startswith("printed no JSON")
    assert (by_name["text"]["state"], by_name["text"]["output"]) == ("ok", "3 passed")


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


@pytest.mark.parametrize("photos", [False, True])
def test_all_steps_together_take_less_than_eight_minutes(tmp_path: Path, photos: bool) -> None:
    own = gpu_steps.steps(
        tmp_path, photos=photos, engines=[spec for spec in BACKENDS if spec.builds_engines]
    )
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
