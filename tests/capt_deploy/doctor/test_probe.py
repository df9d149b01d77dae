import os
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.base import Outputs
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.doctor import probe
from capt_deploy.doctor.probe import GRAPH, SIDE, TO_LOGITS, expected_outputs, probe_backend

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
    trial = probe_backend("onnxruntime-cpu", bundle)
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
    trial = probe_backend(name, bundle)
    assert trial.device is None
    assert said in (trial.reason or "")


def test_a_crash_takes_only_the_trial_with_it(broken_onnxruntime):
    broken_onnxruntime("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    trial = probe_backend("onnxruntime-cpu")
    assert trial.device is None
    assert "SIGSEGV" in (trial.reason or "")


def test_an_exit_is_said_with_the_last_line_of_what_was_printed(broken_onnxruntime):
    broken_onnxruntime("import os\nos.write(2, b'out of luck')\nos._exit(7)\n")
    assert (
        probe_backend("onnxruntime-cpu").reason == "its process ended with exit code 7: out of luck"
    )


def test_a_library_that_hangs_is_given_up(broken_onnxruntime):
    broken_onnxruntime("import time\ntime.sleep(60)\n")
    trial = probe_backend("onnxruntime-cpu", seconds=1.5)
    assert trial.reason == "did not answer within 2 s"
    assert trial.seconds < 30


def test_a_backend_with_wrong_outputs_does_not_work(monkeypatch):
    def wrong(images):
        outputs = expected_outputs(images)
        return outputs._replace(logits=outputs.logits + 0.1)

    monkeypatch.setattr(probe, "expected_outputs", wrong)
    with pytest.raises(RuntimeError, match="wrong logits"):
        probe._run_graph("onnxruntime-cpu")


def build_graph():
    """Return the graph of `probe.onnx`; to write the file anew, save it with `onnx.save`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["means", "to_embedding"], ["embedding"]),
        helper.make_node("MatMul", ["means", "to_logits"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = {"to_embedding": np.eye(3) / 255, "to_logits": np.array(TO_LOGITS)}
    images = ["batch", SIDE, SIDE, 3]
    columns = {"logits": 2, "probabilities": 2, "embedding": 3}
    graph = helper.make_graph(
        nodes,
        "doctor",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, images)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in columns.items()
        ],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    # The last opset in which the axes of a mean are attributes.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_packaged_graph_is_what_onnx_builds():
    onnx = pytest.importorskip("onnx")
    packaged = onnx.load(GRAPH)
    assert packaged == build_graph()
    onnx.checker.check_model(packaged, full_check=True)
    assert GRAPH.stat().st_size < 1024


def test_onnx_runtime_returns_the_expected_outputs():
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    outputs = OnnxRuntime(GRAPH.read_bytes(), "fp32").run(images)
    pairs = zip(Outputs._fields, outputs, expected_outputs(images), strict=True)
    for name, actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=name)


def test_outputs_depend_on_the_image():
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[1, ..., 0] = 255
    first, second = expected_outputs(images).probabilities
    assert first.argmax() == second.argmax() == 0
    assert first[0] == 0.5 and second[0] > 0.99
    np.testing.assert_allclose(expected_outputs(images).embedding[1], [1, 0, 0], atol=1e-6)


def test_tensorrt_can_build_it():
    pytest.importorskip("tensorrt_rtx")
    from capt_deploy.backends.tensorrt.engine import build_engine

    assert len(build_engine(GRAPH.read_bytes(), sm=89)) > 10_000
