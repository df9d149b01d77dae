"""Real builds by TensorRT-RTX, which needs no GPU for them. Nothing is run: that takes a GPU."""

import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.spec import TENSORRT, TENSORRT_RTX
from capt_deploy.backends.tensorrt.engine import _make_monitor, build_engine
from capt_deploy.core.errors import BackendError

GOLDEN = Path(__file__).parents[3] / "golden" / "tiny.capt" / "model.onnx"
SMS = (75, 80, 86, 89, 120, 121)

builds = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here"
)


def graph(kind, *, dtype="FLOAT", domain="", shape=("batch", 8), **attributes):
    """One node between casts, on `images` and, where it takes two inputs, an 8×8 matrix."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed here")
    helper, element = onnx.helper, getattr(onnx.TensorProto, dtype)
    inputs = ["x", "weight"] if "MatMul" in kind else ["x"]
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=element),
        helper.make_node(kind, inputs, ["y"], name="the_node", domain=domain, **attributes),
        helper.make_node("Cast", ["y"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, shape)
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    weight = helper.make_tensor("weight", element, (8, 8), [0.5] * 64)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    made = helper.make_graph(nodes, "graph", [images], [logits], [weight])
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


@builds
@pytest.mark.parametrize("sm", [None, *SMS[1:]])
def test_the_golden_graph_is_built_for_every_gpu_from_ampere_on(sm):
    assert len(build_engine(GOLDEN.read_bytes(), sm=sm)) > GOLDEN.stat().st_size / 4


@builds
def test_engines_for_different_gpus_differ():
    onnx = GOLDEN.read_bytes()
    assert build_engine(onnx, sm=80) != build_engine(onnx, sm=120)


@builds
def test_a_fresh_bundle_is_built(bundle):
    assert build_engine((bundle / "model.onnx").read_bytes(), sm=89)


@builds
@pytest.mark.parametrize("sm", SMS)
def test_half_precision_is_built_for_every_gpu(sm):
    assert build_engine(graph("MatMul", dtype="FLOAT16").SerializeToString(), sm=sm)


@builds
def test_what_a_gpu_cannot_compute_is_named():
    # Turing has no such kernel: https://docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix
    onnx = graph("MatMul", dtype="BFLOAT16").SerializeToString()
    assert build_engine(onnx, sm=80)
    with pytest.raises(BackendError, match=r"cannot build the graph for SM75: .+ datatypes"):
        build_engine(onnx, sm=75)


@builds
@pytest.mark.parametrize("size", [1, 1000, -3000])
def test_a_truncated_graph_is_refused(size):
    with pytest.raises(BackendError, match=r"cannot read the graph: .*parse"):
        build_engine(GOLDEN.read_bytes()[:size], sm=89)


@builds
def test_an_empty_graph_is_refused():
    with pytest.raises(BackendError, match="at least one output"):
        build_engine(b"", sm=89)


@builds
def test_an_unsupported_node_is_named_with_its_operator():
    onnx = graph("FusedMatMul", domain="com.example").SerializeToString()
    with pytest.raises(BackendError, match=r"node the_node \(FusedMatMul\): .*not found"):
        build_engine(onnx, sm=89)


@builds
def test_the_batch_alone_may_be_free():
    with pytest.raises(BackendError, match="images: only its batch may be free"):
        build_engine(graph("Relu", shape=("batch", "width", 8)).SerializeToString(), sm=89)


@builds
def test_a_graph_of_one_batch_size_is_built_as_it_is():
    assert build_engine(graph("Relu", shape=(4, 8)).SerializeToString(), sm=89)


@builds
@pytest.mark.parametrize("sm", [90, 0, 7.5])
def test_an_unknown_sm_is_refused_with_those_that_are_known(sm):
    with pytest.raises(BackendError, match=rf"SM {sm} is not one of 75, 80, 86, 89, 120"):
        build_engine(GOLDEN.read_bytes(), sm=sm)


@builds
def test_a_library_without_targets_takes_no_sm(monkeypatch):
    import tensorrt_rtx

    monkeypatch.delattr(tensorrt_rtx, "ComputeCapability")  # TensorRT 10 has none
    with pytest.raises(BackendError, match="only for the GPU it runs on; leave SM 89 out"):
        build_engine(GOLDEN.read_bytes(), sm=89)


@pytest.fixture
def split_graph(tmp_path):
    """Return a graph whose weights are in `weights.bin`, in a folder of its own."""
    model = graph("MatMul")
    import onnx

    weight = onnx.numpy_helper.from_array(np.full((8, 8), 0.5, np.float32), "weight")
    model.graph.initializer[0].CopyFrom(weight)  # only raw data is moved out
    onnx.save_model(
        *(model, tmp_path / "model.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert (tmp_path / "weights.bin").stat().st_size >= 4 * 64
    return tmp_path


@builds
def test_weights_in_other_files_are_found_where_they_lie(split_graph):
    onnx = (split_graph / "model.onnx").read_bytes()
    assert build_engine(onnx, sm=89, weights_folder=split_graph)
    (split_graph / "weights.bin").unlink()
    with pytest.raises(BackendError, match="initializer: weight"):
        build_engine(onnx, sm=89, weights_folder=split_graph)


@builds
def test_weights_are_not_sought_in_the_current_folder(split_graph, monkeypatch):
    monkeypatch.chdir(split_graph)
    with pytest.raises(BackendError, match="initializer: weight"):
        build_engine((split_graph / "model.onnx").read_bytes(), sm=89)


@builds
def test_builds_in_threads_do_not_mix_up_their_errors():
    wrong = {
        "FusedMatMul": graph("FusedMatMul", domain="com.example").SerializeToString(),
        "Det": graph("Det", shape=("batch", 8, 8)).SerializeToString(),
    }
    said = {}

    def build(name):
        try:
            build_engine(wrong[name], sm=89)
        except BackendError as error:
            said[name] = str(error)

    threads = [threading.Thread(target=build, args=[name]) for name in wrong]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "FusedMatMul" in said["FusedMatMul"]
    assert "Det" not in said["FusedMatMul"]
    assert "(Det)" in said["Det"]


@builds
def test_nothing_is_printed():
    code = f"""
from pathlib import Path
from capt_deploy.backends.tensorrt.engine import build_engine
build_engine(Path({str(GOLDEN)!r}).read_bytes(), sm=89)
try:
    build_engine(b"no graph", sm=89)
except Exception:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_missing_library_names_the_extra_to_install(monkeypatch):
    for spec in (TENSORRT, TENSORRT_RTX):
        monkeypatch.setitem(sys.modules, spec.module, None)
        with pytest.raises(BackendError, match=rf"pip install '\.\[{spec.extra}\]'"):
            build_engine(b"", spec)


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"does not load: libnvinfer\.so\.11"):
        build_engine(b"", TENSORRT)


class Library:
    """A library's way to call back; its monitors are told of all phases, whoever calls."""

    class IProgressMonitor:
        pass


def test_the_steps_of_the_whole_are_shown_and_the_last_ones_filled_in(capsys):
    cancelled = threading.Event()
    monitor = _make_monitor(Library, cancelled)
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
    monitor = _make_monitor(Library, threading.Event())
    monkeypatch.setattr(sys, "stderr", None)
    monitor.phase_start("whole", None, 1)
    assert monitor.step_complete("whole", 0)
    monitor.phase_finish("whole")
