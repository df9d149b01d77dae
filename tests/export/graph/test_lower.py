"""Half precision: what is lowered, what is not, and what the graph is made of."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from capt_train.clip.loading import load_backbone
from export.graph.lower import Float32, lower
from export.graph.onnx_graph import BF16_OPSET, OPSET, OUTPUTS, trace
from export.graph.visual import VisualClassifier
from export.precision.emulation import widened
from export.source.fold import FoldedHead

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def backbone(tiny_model_dir):
    return load_backbone(str(tiny_model_dir), None, torch.device("cpu"))


def head():
    draw = torch.Generator().manual_seed(0)
    return FoldedHead(20 * torch.randn(5, 32, generator=draw), torch.arange(5.0))


def some_pixels(count=6):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=draw)


def network(backbone, precision, **options):
    own = VisualClassifier(backbone, head(), **options).eval()
    own.lower(DTYPES[precision])
    return own


@torch.no_grad()
@pytest.mark.parametrize(("precision", "digits"), [("fp16", 11), ("bf16", 8)])
def test_the_error_is_that_of_the_digits(backbone, precision, digits):
    exact = VisualClassifier(backbone, head()).eval()(some_pixels())
    found = network(backbone, precision)(some_pixels())
    assert all(output.dtype == torch.float32 for output in found)
    error = (found[2] - exact[2]).norm(dim=1).max()
    assert 2.0 ** -(digits + 6) < error < 8 * 2.0**-digits
    torch.testing.assert_close(found[2].norm(dim=1), torch.ones(6))  # normalised in float32
    torch.testing.assert_close(found[0], found[2] @ head().weight.T + head().bias)
    torch.testing.assert_close(found[1], found[0].softmax(dim=1))


def test_norms_and_head_keep_float32_and_everything_else_does_not(backbone):
    own = network(backbone, "fp16")
    kept = {name for name, value in own.named_parameters() if value.dtype == torch.float32}
    assert kept and all(".inner." in name for name in kept)
    assert own.weight.dtype == own.bias.dtype == torch.float32
    assert backbone.model.visual.conv1.weight.dtype == torch.float32  # the backbone is not ours


def test_every_norm_becomes_an_island():
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.RMSNorm(4)))
    lower(layers, torch.float16)
    assert isinstance(layers[1], Float32) and isinstance(layers[2][0], Float32)
    out = layers(torch.full((1, 4), 300.0, dtype=torch.float16))  # squares beyond float16
    assert out.dtype == torch.float16 and bool(out.isfinite().all())


@pytest.fixture(scope="module")
def graphs(backbone):
    opsets = {"fp16": OPSET, "bf16": BF16_OPSET}
    return {
        name: trace(network(backbone, name), 16, 16, name, opset).to_bytes()
        for name, opset in opsets.items()
    }


@pytest.mark.parametrize("precision", DTYPES)
def test_products_are_half_and_norms_softmax_and_logits_are_not(graphs, precision):
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graphs[precision]))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    half, single = ONNX_TYPES[precision], onnx.TensorProto.FLOAT
    for node in graph.node:
        kinds = {types[name] for name in node.output if name in types}
        if node.op_type in ("MatMul", "Gelu"):
            assert kinds == {half}, node.name
        elif node.op_type in ("LayerNormalization", "ReduceL2", "Div"):
            assert kinds == {single}, node.name
    assert all(types[name] == single for name in OUTPUTS)


@pytest.mark.parametrize("precision", DTYPES)
def test_there_is_no_cast_but_around_the_islands(graphs, precision):
    graph = onnx.load_from_string(graphs[precision]).graph
    count = {kind: sum(n.op_type == kind for n in graph.node) for kind in ("Cast", "Shape")}
    islands = sum(n.op_type == "LayerNormalization" for n in graph.node)
    assert count["Cast"] == 2 * islands + 2  # the pixels, and the features
    assert count["Shape"] == 1  # the batch, for the class token


def test_float16_runs_on_the_cpu_and_says_what_torch_says(graphs, backbone):
    session = onnxruntime.InferenceSession(graphs["fp16"], providers=["CPUExecutionProvider"])
    found = session.run(OUTPUTS, {"images": some_pixels().numpy()})
    with torch.no_grad():
        expected = network(backbone, "fp16")(some_pixels())
    np.testing.assert_allclose(found[0], expected[0].numpy(), atol=0.1)


def test_emulated_bfloat16_is_as_far_from_float32_as_torchs_own(graphs, backbone):
    session = onnxruntime.InferenceSession(
        widened(onnx.load_from_string(graphs["bf16"])).SerializeToString()
    )
    found = session.run(OUTPUTS, {"images": some_pixels().numpy()})[2]
    with torch.no_grad():
        torchs = network(backbone, "bf16")(some_pixels())[2].numpy()
        exact = VisualClassifier(backbone, head()).eval()(some_pixels())[2].numpy()
    error = np.linalg.norm(torchs - exact, axis=1).mean()
    assert 0.5 * error < np.linalg.norm(found - exact, axis=1).mean() < 2 * error
    assert np.linalg.norm(found - torchs, axis=1).mean() < error


def test_the_fused_operator_is_there_on_request(backbone):
    own = network(backbone, "fp16", fused_attention=True)
    graph = trace(own, 16, 16, "fp16", 23)
    assert graph.operators["Attention"] == 2 and "Softmax" in graph.operators  # of the logits
    session = onnxruntime.InferenceSession(graph.to_bytes())
    found = session.run(OUTPUTS, {"images": some_pixels().numpy()})
    plain = network(backbone, "fp16")
    with torch.no_grad():
        np.testing.assert_allclose(found[0], plain(some_pixels())[0].numpy(), atol=0.1)
