"""Real builds by TensorRT-RTX into the cache; test_engine_cache.py has all ways to damage it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest

from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.store import Target, key_of, obtain
from capt_deploy.bundle.graphs import StoredGraph, read_metadata
from capt_deploy.bundle.manifest import METADATA_KEY
from capt_deploy.core.errors import BackendError

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here"
)

BUILD = """
import sys
from pathlib import Path
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.store import Target, key_of, obtain
from capt_deploy.bundle.graphs import StoredGraph
graph = StoredGraph(Path(sys.argv[1]).read_bytes(), "fp32")
key = key_of(graph, "tensorrt_rtx", Target(89))
print("starting", flush=True)
engine = obtain(EngineCache(Path(sys.argv[2])), key, graph, Target(89), lambda data: data)
print(len(engine), flush=True)
"""


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def graph(golden):
    return StoredGraph((golden / "model.onnx").read_bytes(), "fp32")


def get(cache, graph, sm=89):
    key = key_of(graph, "tensorrt_rtx", Target(sm))
    return obtain(cache, key, graph, Target(sm), lambda data: data)


def start(golden, cache):
    command = [sys.executable, "-c", BUILD, golden / "model.onnx", cache.folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_engine_is_built_shown_and_kept(cache, graph, capsys):
    engine = get(cache, graph)
    said = capsys.readouterr().err
    assert "building an engine for SM 89, once" in said
    assert "building an engine: 6/6 steps" in said
    assert len(engine) > 100_000
    assert get(cache, graph) == engine
    assert capsys.readouterr().err == ""


def test_a_damaged_engine_is_really_built_again(cache, graph, capsys):
    engine = get(cache, graph)
    path = cache.path_of(key_of(graph, "tensorrt_rtx", Target(89)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    again = get(cache, graph)
    assert "was changed" in capsys.readouterr().err
    assert abs(len(again) - len(engine)) < 0.01 * len(engine)  # builds differ in some bytes
    assert get(cache, graph) == again


def test_two_processes_at_once_build_once(cache, golden):
    both = [start(golden, cache) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert answers[0][0] == answers[1][0] != ""
    assert sum("building an engine for" in stderr for _, stderr in answers) == 1


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


def test_ctrl_c_leaves_no_lock_and_no_entry(cache, golden, graph):
    process = start(golden, cache)
    assert process.stdout.readline() == "starting\n"
    while "building an engine" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in complained.splitlines()
    assert "6/6" not in complained
    assert cache.entries() == []
    assert len(get(cache, graph)) > 100_000


def test_a_gpu_that_the_library_does_not_know_is_an_error_that_keeps_nothing(cache, graph):
    with pytest.raises(BackendError, match="SM 90 is not one of"):
        get(cache, graph, sm=90)
    assert cache.entries() == []


def test_engines_of_rtx_do_not_depend_on_what_it_compiles_for_at_loading(graph):
    here = Target(89, "NVIDIA GeForce RTX 4090", "580.65.06, CUDA 13.0")
    assert key_of(graph, "tensorrt_rtx", here) == key_of(graph, "tensorrt_rtx", Target(89))
    assert key_of(graph, "tensorrt_rtx", Target(86)) != key_of(graph, "tensorrt_rtx", Target(89))


def test_other_graphs_and_weights_have_other_keys(graph, golden, tmp_path):
    base = key_of(graph, "tensorrt_rtx", Target(89))
    changed = replace(graph, onnx=graph.onnx + b"\0")
    assert key_of(changed, "tensorrt_rtx", Target(89)) != base
    assert key_of(graph, "tensorrt_rtx", Target(89), (1, 1, 1)) != base
    # A bundle whose graph has its weights in its own file is read no further.
    assert key_of(replace(graph, weights_folder=golden), "tensorrt_rtx", Target(89)) == base
    # Of a graph that says nothing of itself, every file beside it may hold weights.
    foreign = StoredGraph(b"no manifest", "fp32", tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"1")
    first = key_of(foreign, "tensorrt_rtx", Target(89))
    (tmp_path / "weights.bin").write_bytes(b"2")
    second = key_of(foreign, "tensorrt_rtx", Target(89))
    assert first.weights != second.weights
    assert first.onnx == second.onnx


def test_missing_weights_are_an_error(graph, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"1")
    foreign = replace(graph, onnx=b"no manifest", weights_folder=tmp_path)
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "folder").mkdir()
    assert key_of(foreign, "tensorrt_rtx", Target(89)).weights  # none are there, which is a state
    inside = onnx_with_weights(graph.onnx)
    with pytest.raises(BackendError, match=r"expected the graph's weights, came .*model\.data"):
        key_of(replace(foreign, onnx=inside), "tensorrt_rtx", Target(89))


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
