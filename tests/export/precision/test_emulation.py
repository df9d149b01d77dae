import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.precision.emulation import widened

OPSET = 22


def rounded(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture
def graph():
    """`cast(transpose(cast(x))·W + b)` in bfloat16, from float32 to float32."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(8, 4)).astype(ml_dtypes.bfloat16)
    bias = random.normal(size=4).astype(ml_dtypes.bfloat16)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Transpose", ["narrow"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["turned", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    model = onnx.shape_inference.infer_shapes(model)  # as the exporter does
    return model, weight.astype(np.float32), bias.astype(np.float32)


def run(onnx_bytes, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(onnx_bytes, options)
    return session.run(None, {"x": x})[0]


def test_every_step_is_rounded_as_hardware_does_it(graph):
    model, weight, bias = graph
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    product = rounded(rounded(x).T @ weight)
    expected = rounded(product + bias)
    found = run(widened(model).SerializeToString(), x)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, rounded(x).T @ weight + bias)


def test_no_bfloat16_is_left_but_in_the_roundings(graph):
    model, *_ = graph
    wide = widened(model)
    assert {w.data_type for w in wide.graph.initializer} == {TensorProto.FLOAT}
    to_narrow = [n for n in wide.graph.node if n.op_type == "Cast" and n.attribute[0].i == 16]
    assert len(to_narrow) == 3  # x, product, sum; a transposition rounds nothing


def test_a_float32_graph_stays_as_it_is(bundle):
    before = [node.op_type for node in onnx.load(bundle / "model.onnx").graph.node]
    after = widened(onnx.load(bundle / "model.onnx"))
    assert [node.op_type for node in after.graph.node] == before
