import json

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn

from capt_deploy.bundle.manifest import METADATA_KEY
from capt_deploy.core.errors import ModelError
from export.graph.onnx_graph import OPSET, OUTPUTS, trace


@pytest.fixture(scope="module")
def graph(bundle):
    return onnx.load(bundle / "model.onnx")


def test_input_is_uint8_nhwc_with_a_free_batch_and_a_fixed_size(graph):
    (images,) = graph.graph.input
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    batch, *rest = images.type.tensor_type.shape.dim
    assert batch.dim_param and [dim.dim_value for dim in rest] == [16, 16, 3]
    assert tuple(output.name for output in graph.graph.output) == OUTPUTS
    assert graph.opset_import[0].version == OPSET


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_runs(bundle, batch):
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    pixels = np.zeros((batch, 16, 16, 3), np.uint8)
    logits, probabilities, embedding = session.run(OUTPUTS, {"images": pixels})
    assert (len(logits), len(probabilities), len(embedding)) == (batch,) * 3


def test_the_uint8_input_feeds_only_a_cast(graph):
    users = [node.op_type for node in graph.graph.node if "images" in node.input]
    assert set(users) <= {"Cast", "Shape"}  # a Shape does not read the data
    assert "Cast" in users


def test_no_text_tower_and_no_control_flow_is_left(graph):
    operators = {node.op_type for node in graph.graph.node}
    assert not operators & {"If", "Loop", "Scan", "TopK", "NonZero"}
    shapes = [tuple(weight.dims) for weight in graph.graph.initializer]
    assert not any(49408 in shape for shape in shapes)  # the text tower's vocabulary
    assert (4, 32, 1, 1) in shapes  # the folded class rows, as a convolution


def test_it_describes_itself_and_names_no_folder_of_this_machine(bundle, graph, tuned_run):
    properties = {entry.key: entry.value for entry in graph.metadata_props}
    written = json.loads((bundle / "manifest.json").read_text())
    inside = json.loads(properties[METADATA_KEY])
    assert inside.pop("files") == {}
    assert inside == {key: value for key, value in written.items() if key != "files"}
    data = (bundle / "model.onnx").read_bytes()
    for folder in (str(tuned_run.parent), __file__.rsplit("/tests/", 1)[0]):
        assert folder.encode() not in data


def test_what_cannot_be_traced_is_a_typed_error():
    class Dependent(nn.Module):
        def forward(self, images):
            total = images.float().sum()
            if total > 0:
                return total, total, total
            return -total, total, total

    with pytest.raises(ModelError, match="cannot be traced"):
        trace(Dependent(), 8, 8)
