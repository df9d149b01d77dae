"""Int8 in the whole network, its graph in ONNX Runtime, and what is left out."""

from __future__ import annotations

import json
from contextlib import nullcontext

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from capt_deploy.core.errors import ConfigError, ModelError
from capt_train.clip.loading import load_backbone
from capt_train.run.folder import load_run
from export.graph.attention import SelfAttention
from export.graph.onnx_graph import OUTPUTS, trace
from export.graph.visual import VisualClassifier
from export.precision.int8_layers import (
    Int8Convolution,
    Int8Layer,
    Int8Linear,
    use_unsigned_inputs,
)
from export.precision.quantize import quantize
from export.source.fold import FoldedHead
from export.source.model import source_from_run

LINEAR = (nn.Linear, nn.Conv2d)
TOWERS = {
    "vit": {"vision_cfg": {"width": 64, "layers": 3}},
    "timm": {
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 160,
        }
    },
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
}


@pytest.fixture(scope="module")
def backbones(write_model):
    def load(name):
        folder = write_model(**TOWERS[name])
        return load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))

    return {name: load(name) for name in TOWERS}


def head(backbone, classes=9):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(classes, 32, generator=draw)
    return FoldedHead(20 * nn.functional.normalize(rows, dim=-1), torch.zeros(classes))


def some_pixels(backbone, count, seed=1):
    """Return images of different colours, so that their embeddings lie apart."""
    draw = torch.Generator().manual_seed(seed)
    colours = 256 * torch.rand(count, 1, 1, 3, generator=draw)
    noise = 40 * torch.randn(count, *backbone.preprocess.size, 3, generator=draw)
    return (colours + noise).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def noise_of(found, expected):
    signal = (expected - expected.mean(dim=0)).square().sum(dim=1).mean()
    return float(((found - expected).square().sum(dim=1).mean() / signal).sqrt())


def make(backbones, name, target=10.0, fused_attention=False):
    backbone = backbones[name]
    network = VisualClassifier(backbone, head(backbone), fused_attention=fused_attention).eval()
    images = some_pixels(backbone, 12)
    with torch.no_grad():
        expected = network(images)
    return network, images, expected, quantize(network, images, target)


def session(data):
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # ALL crashes on fp16
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "unsigned"), [*((name, False) for name in TOWERS), ("vit", True), ("resnet", True)]
)
def test_onnx_runtime_computes_what_torch_simulates(backbones, name, unsigned):
    network, images, expected, done = make(backbones, name)
    simulated = network(images)
    assert done.work > 0.8 and noise_of(simulated[0], expected[0]) > 1e-3
    with use_unsigned_inputs(network) if unsigned else nullcontext():
        graph = trace(network, *backbones[name].preprocess.size, "int8")
    found = session(graph.to_bytes()).run(OUTPUTS, {"images": images.numpy()})
    logits = torch.from_numpy(found[0])
    # A value that lies between two codes may fall to either side, and then moves others.
    differences = (logits - simulated[0]).abs().amax(dim=1)
    assert differences.quantile(0.25) < 1e-5
    assert noise_of(logits, simulated[0]) < 0.6 * done.noise


@torch.no_grad()
def test_unsigned_codes_lie_around_128_and_only_while_they_are_asked_for(backbones):
    network, *_ = make(backbones, "vit")
    graphs = []
    for context in (use_unsigned_inputs(network), nullcontext()):
        with context:
            data = trace(network, *backbones["vit"].preprocess.size, "int8").to_bytes()
        graphs.append(onnx.load_from_string(data).graph)
    for graph, kind, zero in zip(graphs, ("UINT8", "INT8"), (128, 0), strict=True):
        held = {one.name: one for one in graph.initializer}
        zeros = [held[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
        assert {z.data_type for z in zeros} == {onnx.TensorProto.DataType.Value(kind)}
        assert {int(onnx.numpy_helper.to_array(z)) for z in zeros} == {zero}


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_the_graph_holds_bytes_and_computes_in_half_precision(backbones, name):
    network, images, expected, done = make(backbones, name)
    codes = [buffer for part, buffer in network.named_buffers() if part.endswith("codes")]
    network.lower(torch.float16)
    graph = trace(network, *backbones[name].preprocess.size, "int8")
    model = onnx.load_from_string(graph.to_bytes())
    own = model.graph.initializer
    held = {one.name: one for one in own if one.data_type == onnx.TensorProto.INT8}
    weights = sum(buffer.numel() for buffer in codes)
    assert sum(len(one.raw_data) for one in held.values() if one.dims) == weights > 50_000
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = held[node.input[2]]
            assert not zero.dims and zero.raw_data == b"\0"
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    types = {one.data_type for one in own if one.name in scales}
    assert types == {onnx.TensorProto.FLOAT16}
    half = VisualClassifier(backbones[name], head(backbones[name])).eval()
    half.lower(torch.float16)
    floats = sum(4 * value.numel() for value in half.state_dict().values())
    assert model.ByteSize() < floats - 2.5 * weights
    limit = 1.5 * (done.noise + noise_of(half(images)[0], expected[0]))
    found = session(graph.to_bytes()).run(OUTPUTS, {"images": images.numpy()})
    assert noise_of(torch.from_numpy(found[0]), expected[0]) < limit


def test_what_is_called_is_replaced_but_for_what_has_few_channels(backbones):
    network, _, _, done = make(backbones, "vit")
    floating = {name for name, own in network.named_modules() if type(own) in LINEAR}
    assert floating == {"visual.conv1"}
    assert done.layers["visual.conv1"].left_out
    assert len(done.layers) == 3 * 4 + 1
    assert sum(layer.work for layer in done.layers.values()) == pytest.approx(1)
    kept = sum(layer.work for layer in done.layers.values() if not layer.left_out)
    assert done.work == pytest.approx(kept) and 0.9 < kept < 1
    network, _, _, done = make(backbones, "resnet")
    floating = {name for name, own in network.named_modules() if isinstance(own, nn.Linear)}
    # attention pooling reads these without calling them
    assert floating == {f"visual.attnpool.{letter}_proj" for letter in "qkvc"}
    assert not any("attnpool" in name for name in done.layers)
    assert sum(isinstance(own, Int8Convolution) for own in network.modules()) > 10
    assert done.layers["visual.conv1"].left_out


@torch.no_grad()
def test_the_report_says_what_the_network_does(backbones):
    network, images, expected, done = make(backbones, "vit")
    assert noise_of(network(images)[0], expected[0]) == pytest.approx(done.noise, rel=1e-3)
    assert done.images == 12
    again = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert again["layers"]["visual.conv1"]["noise"] > 0
    assert set(again["layers"]["visual.conv1"]) == {"noise", "clip", "work", "left_out"}


@torch.no_grad()
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_layers_are_left_out_until_the_target_is_met(backbones, share):
    _, _, _, everything = make(backbones, "vit")
    target = share * everything.noise
    network, images, expected, done = make(backbones, "vit", target)
    assert 0 < noise_of(network(images)[0], expected[0]) <= target == done.target
    left = [name for name, layer in done.layers.items() if layer.left_out == "noise"]
    assert 0 < len(left) < 12
    for name in left:
        assert type(network.get_submodule(name)) is nn.Linear


@torch.no_grad()
def test_a_layer_that_cannot_bear_it_is_left_out_and_no_other(backbones):
    backbone = backbones["vit"]
    network = VisualClassifier(backbone, head(backbone)).eval()
    images = some_pixels(backbone, 12)
    expected = network(images)[0]
    block = network.visual.transformer.resblocks[1]
    # One huge channel that is hardly read: the same function, but a range too wide for the others.
    block.ln_2.weight[3] *= 3000
    block.ln_2.bias[3] *= 3000
    block.mlp.c_fc.weight[:, 3] /= 3000
    torch.testing.assert_close(network(images)[0], expected, rtol=0, atol=1e-3)
    done = quantize(network, images, target=0.1)
    left = [name for name, layer in done.layers.items() if layer.left_out == "noise"]
    assert left == ["visual.transformer.resblocks.1.mlp.c_fc"]
    assert noise_of(network(images)[0], expected) <= 0.1


def test_twice_the_same(backbones):
    first, _, _, one = make(backbones, "vit", 0.02)
    second, _, _, other = make(backbones, "vit", 0.02)
    assert one == other
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_attention_as_one_operator_is_measured_too(backbones):
    network, _, _, fused = make(backbones, "vit", fused_attention=True)
    _, _, _, plain = make(backbones, "vit")
    for name, layer in fused.layers.items():
        assert layer.noise == pytest.approx(plain.layers[name].noise, rel=0.05)
    attentions = [own for own in network.modules() if isinstance(own, SelfAttention)]
    assert len(attentions) == 3 and all(own.fused for own in attentions)


@torch.no_grad()
def test_weights_that_the_sample_experts_read_stay(tuned_run):
    model = load_run(tuned_run)
    own = source_from_run(model).head
    network = VisualClassifier(model.learner.backbone, own, model.visual).eval()
    images = some_pixels(model.learner.backbone, 12)
    expected = network(images)
    done = quantize(network, images, target=10.0)
    left = {name for name, layer in done.layers.items() if "experts" in layer.left_out}
    last = "visual.transformer.resblocks.1.mlp"
    assert left == {f"{last}.c_fc", f"{last}.c_proj"}
    found = network(images)
    assert 0 < noise_of(found[0], expected[0]) < 1
    assert isinstance(network.visual.transformer.resblocks[0].mlp.c_fc, Int8Linear)
    network.lower(torch.float16)
    graph = trace(network, *model.backbone.preprocess.size, "int8")
    runtime = session(graph.to_bytes()).run(OUTPUTS, {"images": images.numpy()})
    assert noise_of(torch.from_numpy(runtime[0]), expected[0]) < 2 * done.noise


def test_what_cannot_be_done_is_refused(backbones):
    backbone = backbones["vit"]
    network = VisualClassifier(backbone, head(backbone))
    images = some_pixels(backbone, 3)
    with pytest.raises(ConfigError, match="some tens of images, came 1"):
        quantize(network, images[:1])
    with pytest.raises(ModelError, match="every layer"):
        quantize(network, images, target=1e-6)
    assert not any(isinstance(own, Int8Layer) for own in network.modules())
