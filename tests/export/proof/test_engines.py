"""Exported graphs are parsed and built by TensorRT-RTX, which needs no GPU for it."""

import importlib.util
import json
from collections import Counter

import onnx
import pytest

from capt_deploy.backends.tensorrt.engine import build_engine
from capt_deploy.core.errors import BackendError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
# Turing has neither float32 matrix products nor bfloat16.
OLDEST = {"fp32": 80, "fp16": 75, "bf16": 80, "int8": 80}
SMS = (75, 80, 86, 89, 120, 121)


def graph(bundle, precision):
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    return (bundle / graphs[precision]["file"]).read_bytes()


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("precision", OLDEST)
def test_every_graph_is_built_for_every_gpu_that_is_claimed(full_bundle, precision, sm):
    onnx_bytes = graph(full_bundle, precision)
    if sm < OLDEST[precision]:
        pytest.skip(f"{precision} is not claimed for SM{sm}")
    assert len(build_engine(onnx_bytes, sm=sm)) > 10_000


def test_a_node_that_tensorrt_does_not_know_fails_the_build(full_bundle):
    model = onnx.load_from_string(graph(full_bundle, "fp16"))
    (softmax,) = [n for n in model.graph.node if n.output[0] == "probabilities"]
    softmax.op_type = "Magic"
    with pytest.raises(BackendError, match="Magic"):
        build_engine(model.SerializeToString(), sm=89)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_there_is_nothing_left_to_simplify(full_bundle, precision):
    onnxslim = pytest.importorskip("onnxslim")
    model = onnx.load_from_string(graph(full_bundle, precision))
    before = Counter(node.op_type for node in model.graph.node)
    after = Counter(node.op_type for node in onnxslim.slim(model).graph.node)
    # the tiny model's biases are zeros, which a real one's are not
    assert set(before - after) <= {"Add", "Unsqueeze"}
