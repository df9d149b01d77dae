import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest

from capt_deploy.backends.tensorrt.progress import cancellable, make_monitor

BUILDS = """
import sys, time
from pathlib import Path
from capt_deploy.backends.tensorrt.engine import build_engine
from capt_deploy.backends.tensorrt.progress import cancellable
onnx = Path(sys.argv[1]).read_bytes()
def build(cancelled):
    while True:  # builds of so small a graph end before anybody could stop them
        print("building", flush=True)
        build_engine(onnx, sm=89, cancelled=cancelled)
try:
    cancellable(build)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_what_is_built_is_returned():
    assert cancellable(lambda cancelled: cancelled.is_set()) is False


def test_an_error_is_passed_on():
    with pytest.raises(TimeoutError, match="of its own"):
        cancellable(lambda cancelled: next(iter(())) if cancelled.is_set() else fail())


def fail():
    raise TimeoutError("of its own")


def test_ctrl_c_stops_the_build_and_waits_for_its_end():
    ended = []

    def build(cancelled):
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        assert cancelled.wait(30)
        time.sleep(0.2)  # libraries stop at their next step, not at once
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        cancellable(build)
    assert ended == [True]


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here")
def test_ctrl_c_ends_a_real_build(golden):
    command = [sys.executable, "-c", BUILDS, golden / "model.onnx"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2):
        assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=30)
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in complained
    assert process.returncode == 0


class Library:
    """A library's way to call back; its monitors are told of all phases, whoever calls."""

    class IProgressMonitor:
        pass


def test_the_steps_of_the_whole_are_shown_and_the_last_ones_filled_in(capsys):
    cancelled = threading.Event()
    monitor = make_monitor(Library, cancelled)
    monitor.phase_start("whole", None, 3)
    monitor.phase_start("part", "whole", 100)
    assert all(monitor.step_complete("part", step) for step in range(100))
    monitor.phase_finish("part")
    assert monitor.step_complete("whole", 0)
    monitor.phase_finish("whole")
    assert capsys.readouterr().err == "building an engine: 3/3 steps\n"
    cancelled.set()
    assert not monitor.step_complete("whole", 1)


def test_a_closed_terminal_does_not_reach_the_library(monkeypatch):
    monitor = make_monitor(Library, threading.Event())
    monkeypatch.setattr(sys, "stderr", None)
    monitor.phase_start("whole", None, 1)
    assert monitor.step_complete("whole", 0)
    monitor.phase_finish("whole")
