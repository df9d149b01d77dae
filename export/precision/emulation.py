"""Emulate bfloat16 graphs in float32, for ONNX Runtime has no bfloat16 products on the CPU.

Each operator is computed in float32 and its result rounded to bfloat16 and back, as hardware with
float32 accumulators does it.
"""

from pathlib import Path
from typing import Any

# Operators that only move values, which are rounded already.
_MOVING = {
    *("Reshape", "Transpose", "Split", "Concat", "Slice", "Gather", "Expand", "Unsqueeze"),
    *("Squeeze", "Identity", "Flatten", "Pad", "MaxPool", "Relu"),
}


def write_widened(path: Path, out: Path) -> None:
    """Write a graph with float32 in the place of bfloat16, and roundings to bfloat16.

    Args:
        path: the graph; a second file of weights lies beside it.
        out: the file to write, with a second file `OUT.data`.
    """
    import onnx

    model = widened(onnx.load(path))
    onnx.save_model(model, out, save_as_external_data=True, location=f"{out.name}.data")


def widened(model: Any) -> Any:
    """Return an `onnx.ModelProto`, whose weights are in memory, widened in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    narrow = {
        value.name
        for value in (*graph.value_info, *graph.output)  # the exporter records all types
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes: list[Any] = []
    for node in graph.node:
        rounded = [name for name in node.output if name in narrow and node.op_type not in _MOVING]
        for name in rounded:
            node.output[[*node.output].index(name)] = f"{name}.exact"
        if node.op_type == "Cast" and rounded:
            node.attribute[0].i = TensorProto.FLOAT
        nodes.append(node)
        for name in rounded:
            exact, half = f"{name}.exact", f"{name}.rounded"
            nodes.append(helper.make_node("Cast", [exact], [half], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model
