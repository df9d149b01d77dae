import os
from pathlib import Path

import pytest

from capt_deploy.doctor import graph as doctor_graph
from capt_deploy.doctor import probe as doctor_probe
from capt_deploy.doctor.probe import try_backend

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def broken_onnxruntime(tmp_path, monkeypatch):
    """Return a function that lets processes started from here import some code as onnxruntime."""

    def write(code):
        (tmp_path / "onnxruntime.py").write_text(code)
        before = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")

    return write


@pytest.mark.parametrize("bundle", [None, GOLDEN / "tiny.capt"])
def test_what_works_is_said_with_its_device(bundle):
    trial = try_backend("onnxruntime-cpu", bundle)
    assert (trial.device, trial.reason) == ("cpu", None)
    assert trial.seconds > 0


@pytest.mark.parametrize(
    ("name", "bundle", "said"),
    [
        ("magic", None, "expected one of"),
        ("onnxruntime-cpu", Path("nowhere.capt"), "no such bundle"),
    ],
)
def test_what_does_not_work_is_said_with_its_reason(name, bundle, said):
    trial = try_backend(name, bundle)
    assert trial.device is None
    assert said in (trial.reason or "")


def test_a_crash_takes_only_the_trial_with_it(broken_onnxruntime):
    broken_onnxruntime("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    trial = try_backend("onnxruntime-cpu")
    assert trial.device is None
    assert "SIGSEGV" in (trial.reason or "")


def test_an_exit_is_said_with_the_last_line_of_what_was_printed(broken_onnxruntime):
    broken_onnxruntime("import os\nos.write(2, b'out of luck')\nos._exit(7)\n")
    assert (
        try_backend("onnxruntime-cpu").reason == "its process ended with exit code 7: out of luck"
    )


def test_a_library_that_hangs_is_given_up(broken_onnxruntime):
    broken_onnxruntime("import time\ntime.sleep(60)\n")
    trial = try_backend("onnxruntime-cpu", seconds=1.5)
    assert trial.reason == "did not answer within 2 s"
    assert trial.seconds < 30


def test_a_backend_that_says_something_wrong_does_not_work(monkeypatch):
    right = doctor_graph.expected_outputs
    monkeypatch.setattr(
        doctor_graph,
        "expected_outputs",
        lambda images: right(images)._replace(logits=right(images).logits + 0.1),
    )
    with pytest.raises(RuntimeError, match="wrong logits"):
        doctor_probe._run_graph("onnxruntime-cpu")
