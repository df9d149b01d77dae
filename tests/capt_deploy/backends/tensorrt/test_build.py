"""Real builds by TensorRT-RTX into the cache; test_cache.py has all ways to damage it."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest

from capt_deploy.backends.spec import TENSORRT_RTX
from capt_deploy.backends.tensorrt.build import EngineRequest, run_cancellable
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.bundle.graphs import StoredGraph, read_metadata
from capt_deploy.bundle.manifest import METADATA_KEY
from capt_deploy.core.errors import BackendError
from tests.capt_deploy.backends.tensorrt.host_device import HostDevice

builds = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here"
)

BUILD = """
import sys
from pathlib import Path
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.spec import TENSORRT_RTX
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.core.console import messages_on_stderr
shown = messages_on_stderr()
shown.__enter__()
graph = StoredGraph(Path(sys.argv[1]).read_bytes(), "fp32")
request = EngineRequest(graph, TENSORRT_RTX, 89)
request.key
print("starting", flush=True)
engine = request.obtain(EngineCache(Path(sys.argv[2])), lambda data: data)
print(len(engine), flush=True)
"""


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def graph(golden):
    return StoredGraph((golden / "model.onnx").read_bytes(), "fp32")


def key_of(graph, sm=89, batches=(1, 8, 32)):
    return EngineRequest(graph, TENSORRT_RTX, sm, batches).key


def get(cache, graph, sm=89):
    return EngineRequest(graph, TENSORRT_RTX, sm).obtain(cache, lambda data: data)


def start(golden, cache):
    command = [sys.executable, "-c", BUILD, golden / "model.onnx", cache.folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@builds
def test_an_engine_is_built_shown_and_kept(cache, graph, capsys):
    engine = get(cache, graph)
    said = capsys.readouterr().err
    assert "building an engine for SM 89, once" in said
    assert "building an engine: 6/6 steps" in said
    assert len(engine) > 100_000
    assert get(cache, graph) == engine
    assert capsys.readouterr().err == ""


@builds
def test_a_damaged_engine_is_really_built_again(cache, graph, capsys):
    engine = get(cache, graph)
    path = cache.path_of(key_of(graph, 89))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    again = get(cache, graph)
    assert "was changed" in capsys.readouterr().err
    assert abs(len(again) - len(engine)) < 0.01 * len(engine)  # builds differ in some bytes
    assert get(cache, graph) == again


@builds
def test_two_processes_at_once_build_once(cache, golden):
    both = [start(golden, cache) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert answers[0][0] == answers[1][0] != ""
    assert sum("building an engine for" in stderr for _, stderr in answers) == 1


@builds
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.6])
def test_a_build_killed_at_any_time_leaves_nothing_that_is_used(seconds, cache, golden, graph):
    process = start(golden, cache)
    assert process.stdout.readline() == "starting\n"
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert len(get(cache, graph)) > 100_000
    cache.prune()
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".entry", ".lock"]


@builds
def test_ctrl_c_leaves_no_lock_and_no_entry(cache, golden, graph):
    process = start(golden, cache)
    assert process.stdout.readline() == "starting\n"
    assert any("building an engine" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in complained.splitlines()
    assert "6/6" not in complained
    assert cache.entries() == []
    assert len(get(cache, graph)) > 100_000


@builds
def test_a_gpu_that_the_library_does_not_know_is_an_error_that_keeps_nothing(cache, graph):
    with pytest.raises(BackendError, match="SM 90 is not one of"):
        get(cache, graph, sm=90)
    assert cache.entries() == []


@builds
def test_engines_of_rtx_do_not_depend_on_what_it_compiles_for_at_loading(graph):
    here = EngineRequest(graph, TENSORRT_RTX, 89, device=HostDevice())
    assert here.key == key_of(graph, 89)
    assert key_of(graph, 86) != key_of(graph, 89)


@builds
def test_other_graphs_and_weights_have_other_keys(graph, golden, tmp_path):
    base = key_of(graph, 89)
    changed = replace(graph, onnx=graph.onnx + b"\0")
    assert key_of(changed, 89) != base
    assert key_of(graph, 89, (1, 1, 1)) != base
    split = replace(graph, onnx=onnx_with_weights(graph.onnx), weights_folder=tmp_path)
    (tmp_path / "model.data").write_bytes(b"1")
    first = key_of(split)
    (tmp_path / "model.data").write_bytes(b"2")
    second = key_of(split)
    assert first.weights != second.weights
    assert first.onnx == second.onnx


@builds
def test_missing_weights_are_an_error(graph, tmp_path):
    inside = onnx_with_weights(graph.onnx)
    with pytest.raises(BackendError, match=r"expected the graph's weights, came .*model\.data"):
        key_of(replace(graph, onnx=inside, weights_folder=tmp_path))


def onnx_with_weights(onnx):
    """Let the manifest inside a graph name a file of weights."""
    text = read_metadata(onnx)
    manifest = json.loads(text)
    manifest["graphs"]["fp32"]["weights"] = "model.data"
    own = json.dumps(manifest).encode()
    entry = b"\x0a" + varint(len(METADATA_KEY)) + METADATA_KEY.encode()
    entry += b"\x12" + varint(len(own)) + own
    return b"\x72" + varint(len(entry)) + entry + onnx  # field 14, in front of the old one


def varint(number):
    parts = []
    while number > 0x7F:
        parts.append(0x80 | (number & 0x7F))
        number >>= 7
    return bytes([*parts, number])


BUILDS = """
import sys, time
from pathlib import Path
from capt_deploy.backends.tensorrt.engine import build_engine
from capt_deploy.backends.tensorrt.build import run_cancellable
onnx = Path(sys.argv[1]).read_bytes()
def build(cancelled):
    while True:  # builds of so small a graph end before anybody could stop them
        print("building", flush=True)
        build_engine(onnx, sm=89, cancelled=cancelled)
try:
    run_cancellable(build)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_what_is_built_is_returned():
    assert run_cancellable(lambda cancelled: cancelled.is_set()) is False


def test_an_error_is_passed_on():
    with pytest.raises(TimeoutError, match="of its own"):
        run_cancellable(lambda cancelled: next(iter(())) if cancelled.is_set() else fail())


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
        run_cancellable(build)
    assert ended == [True]


@builds
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
