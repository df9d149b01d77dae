import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.base import Backend, DeviceTimed
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.machine import usable_cores

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()


def test_outputs_are_consistent_with_each_other():
    backend = OnnxRuntime(ONNX, "fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    logits, probabilities, embedding = backend.run(pixels)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    assert (backend.name, backend.device) == ("onnxruntime", "cpu")


def test_every_optimisation_level_says_the_same():
    # half precision gets a lower level than float32, see the backend
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    high, low = (OnnxRuntime(ONNX, precision).run(pixels) for precision in ("fp32", "fp16"))
    np.testing.assert_allclose(high.logits, low.logits, atol=1e-4)


def test_a_damaged_graph_is_a_typed_error():
    with pytest.raises(BackendError, match="cannot load the graph"):
        OnnxRuntime(ONNX[:1000], "fp32")


def test_weights_beside_the_current_folder_are_not_read(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="needed to make such a graph")
    weights = onnx.numpy_helper.from_array(np.arange(400, dtype=np.float32), "w")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [400])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [output], [weights])
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    path = tmp_path / "evil.onnx"
    onnx.save(model, path, save_as_external_data=True, location="secret", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match=r"External data|none/secret"):
        OnnxRuntime(path.read_bytes(), "fp32")


def test_it_is_a_backend_and_measures_no_device():
    backend = OnnxRuntime(ONNX, "fp32")
    assert isinstance(backend, Backend)
    assert not isinstance(backend, DeviceTimed)


@pytest.mark.parametrize(("threads", "expected"), [(None, usable_cores()), (1, 1), (3, 3)])
def test_it_computes_on_the_cores_it_may_use_or_on_those_it_is_told(threads, expected):
    backend = OnnxRuntime(ONNX, "fp32", options=RuntimeOptions(threads=threads))
    assert backend._session.get_session_options().intra_op_num_threads == expected


def test_a_large_batch_is_split_and_says_the_same():
    pixels = np.random.default_rng(2).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    whole = OnnxRuntime(ONNX, "fp32").run(pixels)
    parts = OnnxRuntime(ONNX, "fp32", options=RuntimeOptions(batches=(1, 2, 4))).run(pixels)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_pixels_of_another_shape_are_a_typed_error():
    with pytest.raises(BackendError, match=r"cannot run the graph: .*images"):
        OnnxRuntime(ONNX, "fp32").run(np.zeros((1, 8, 16, 3), np.uint8))


def test_a_closed_backend_runs_nothing_and_can_be_closed_again():
    backend = OnnxRuntime(ONNX, "fp32")
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(np.zeros((1, 16, 16, 3), np.uint8))


def test_bfloat16_is_refused_on_the_cpu():
    with pytest.raises(UnavailableError, match="no bfloat16 kernels on the CPU"):
        OnnxRuntime(ONNX, "bf16")


@pytest.mark.parametrize(("before", "expected"), [(None, "1"), ("0", "0")])
def test_nothing_is_reported_to_others_unless_the_environment_says_so(before, expected):
    code = "from capt_deploy.backends.onnxruntime import import_library as i; i()"
    code += "; import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
