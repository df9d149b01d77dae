from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends import create
from capt_deploy.errors import BackendError

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()


def test_outputs_are_consistent_with_each_other():
    backend = create("onnxruntime", ONNX, "fp32")
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
    high, low = (create("auto", ONNX, precision).run(pixels) for precision in ("fp32", "fp16"))
    np.testing.assert_allclose(high.logits, low.logits, atol=1e-4)


def test_a_damaged_graph_is_a_typed_error():
    with pytest.raises(BackendError, match="cannot load the graph"):
        create("auto", ONNX[:1000], "fp32")


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
    with pytest.raises(BackendError, match="External data"):
        create("onnxruntime", path.read_bytes(), "fp32")
