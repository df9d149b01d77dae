"""Adapter, sample experts and visual prompts in the exported graph (METHOD 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.data.preprocess import preprocess
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.clip.loading import load_backbone
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, make_learner
from export.graph.onnx_graph import OUTPUTS, OnnxGraph, trace
from export.graph.visual import VisualClassifier
from export.source.fold import FoldedHead
from tests.configs import train_config

BOTH = ("adapter", "sample-experts")
VOCABULARY = 49408
TOWERS: dict[str, dict[str, Any]] = {
    "token": {"image_size": [16, 24], "layers": 4},
    "mean": {"pool_type": "avg", "layers": 4, "ls_init_value": 0.4},
    "timm": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "efficientnet": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
}
CONVOLUTIONAL = ("resnet", "efficientnet")


def tuned(backbone: Backbone, noise: float, **settings: Any) -> Learner:
    """Return random parts, far from their start, at α 0.7 and κ 0.5."""
    config = train_config(
        data="",
        model="",
        added=(
            *BOTH,
            "visual-prompts",
        ),
        **settings,
    )
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    learner = make_learner(backbone, config, split, zero_shot)
    draw = torch.Generator().manual_seed(3)
    for parameter in learner.visual_parameters:
        parameter.data += noise * torch.randn(parameter.shape, generator=draw)
    learner.visual.set_constants(alpha=0.7, strength=0.5)
    return learner


def head(dim: int, scale: float = 100.0, classes: int = 9) -> FoldedHead:
    draw = torch.Generator().manual_seed(0)
    rows = functional.normalize(torch.randn(classes, dim, generator=draw), dim=-1)
    return FoldedHead(scale * rows, torch.linspace(-1, 1, classes))


def export(
    backbone: Backbone, learner: Learner, folded: FoldedHead
) -> tuple[VisualClassifier, OnnxGraph]:
    network = VisualClassifier(backbone, folded, learner.visual)
    return network, trace(network, *backbone.preprocess.size)


def run(graph: OnnxGraph, pixels: Tensor) -> Sequence[Any]:
    session = onnxruntime.InferenceSession(graph.to_bytes(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(one) for one in session.run(OUTPUTS, {"images": pixels.numpy()})]


def some_pixels(backbone: Backbone, count: int) -> Tensor:
    shape = (count, *backbone.preprocess.size, 3)
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def make_model(write_model: Callable[..., Path]) -> Callable[[str], tuple[Backbone, Learner]]:
    made: dict[str, tuple[Backbone, Learner]] = {}

    def make(name: str) -> tuple[Backbone, Learner]:
        if name not in made:
            statistics = {"mean": [0.3, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
            folder = write_model(preprocess=statistics, vision_cfg=TOWERS[name])
            backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
            made[name] = backbone, tuned(backbone, 0.3)
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(make_model: Any) -> tuple[Backbone, Learner, VisualClassifier, OnnxGraph]:
    backbone, learner = make_model("token")
    return backbone, learner, *export(backbone, learner, head(32))


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_the_network_says_what_the_tuned_model_says(make_model, name):
    backbone, learner = make_model(name)
    network = VisualClassifier(backbone, head(32), learner.visual).eval()
    assert network.normalises == (name in CONVOLUTIONAL)
    check(network(some_pixels(backbone, 3)), backbone, learner, 3)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_the_graph_of_a_convolutional_tower_says_so_too(make_model, name):
    backbone, learner = make_model(name)
    assert {*learner.visual.parts} == {"adapter", "sample-experts"}
    _, graph = export(backbone, learner, head(32))
    check(run(graph, some_pixels(backbone, 3)), backbone, learner, 3)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_graph_says_what_the_tuned_model_says(exported, count):
    backbone, learner, _, graph = exported
    check(run(graph, some_pixels(backbone, count)), backbone, learner, count)


def check(found: Sequence[Any], backbone: Backbone, learner: Learner, count: int) -> None:
    pixels = some_pixels(backbone, count)
    embeddings = learner.image_embeddings(pixels)
    assert (embeddings - backbone.image_embeddings(pixels)).abs().max() > 0.01
    logits = embeddings @ head(32).weight.T + head(32).bias
    # batch norms that go into convolutions round a little differently
    atol = 5e-4 if type(backbone.tower).__name__ == "ConvTower" else 1e-4
    torch.testing.assert_close(found[0], logits, rtol=0, atol=atol)
    torch.testing.assert_close(found[1], logits.softmax(dim=1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[2], embeddings, rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_tuned_tower_has_the_colour_map_in_front_of_it(make_model):
    backbone, plain = make_model("token")
    colours = ColourMap(torch.eye(3) + 0.4 * torch.eye(3).roll(1, 0), torch.ones(3) / 4)
    learner = tuned(backbone.recoloured(colours), 0.3)
    pixels = some_pixels(backbone, 3)
    embeddings = learner.image_embeddings(pixels)
    assert (embeddings - plain.image_embeddings(pixels)).abs().max() > 0.01
    network = VisualClassifier(learner.backbone, head(32), learner.visual).eval()
    check(network(pixels), backbone, learner, 3)


def graph_of(exported: Any) -> Any:
    return onnx.load_from_string(exported[3].to_bytes()).graph


def test_the_graph_has_no_text_tower_and_no_control_flow(exported):
    graph = graph_of(exported)
    operators = {node.op_type for node in graph.node}
    assert not operators & {"If", "Loop", "Scan", "TopK", "NonZero", "Where"}
    shapes = [tuple(weight.dims) for weight in graph.initializer]
    assert not any(VOCABULARY in shape for shape in shapes)
    # the visual side and small constants, nothing more
    backbone, learner, *_ = exported
    own = (backbone.model.visual, learner.visual)
    weights = sum(value.numel() for part in own for value in part.parameters())
    stored = sum(int(np.prod(shape)) for shape in shapes)
    assert 0.97 * weights < stored < 1.2 * weights


def test_the_graph_is_static_apart_from_the_batch(exported):
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(exported[3].to_bytes())).graph
    free = {
        dim.dim_param
        for value in (*graph.input, *graph.output)
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    }
    assert len(free) == 1
    for value in graph.output:
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param and all(dim.dim_value for dim in rest)


def test_constants_are_folded_into_the_weights(exported):
    _, learner, network, _ = exported
    assert network.tuner.alpha is None and network.tuner.strength is None
    names = {weight.name for weight in graph_of(exported).initializer}
    assert not any(name.endswith(("alpha", "strength")) for name in names)
    own = learner.visual.state_dict()
    shown = network.tuner.state_dict()
    for name in own.keys() - {"alpha"}:
        factor = 1.0
        if "convolution" in name:
            factor = 0.7 * 0.5
        elif "sample-experts" in name and name.endswith("_up"):
            factor = 0.5
        torch.testing.assert_close(shown[name], factor * own[name])


def test_the_learner_and_the_backbone_stay_as_they_are(exported):
    backbone, learner, *_ = exported
    modules: tuple[nn.Module, ...] = (backbone.model, learner)
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    VisualClassifier(backbone, head(32), learner.visual)
    for module, was in zip(modules, before, strict=True):
        now = module.state_dict()
        assert was.keys() == now.keys()
        assert all(torch.equal(was[name], now[name]) for name in was)
    assert float(learner.visual.alpha) == pytest.approx(0.7)
    assert float(learner.visual.strength) == 0.5


def test_without_a_tuner_the_frozen_tower_is_exported(exported):
    backbone, learner, *_ = exported
    pixels = some_pixels(backbone, 2)
    network = VisualClassifier(backbone, head(32)).eval()
    learner.visual.set_constants(strength=0.0)
    still = VisualClassifier(backbone, head(32), learner.visual).eval()
    learner.visual.set_constants(strength=0.5)
    with torch.no_grad():
        expected = backbone.image_embeddings(pixels)
        torch.testing.assert_close(network(pixels)[2], expected, rtol=0, atol=2e-6)
        # prompts know no strength
        assert (still(pixels)[2] - expected).abs().max() > 1e-4


def test_on_a_thousand_photos_the_graph_equals_the_trained_model(shared):
    model = shared / "models/tinyclip-cifar"
    folder = shared / "data/cifar100/val"
    photos = sorted(folder.glob("*/*.png"))[::2][:1000]
    if len(photos) < 1000 or not model.is_dir():
        pytest.skip("the shared model or its photos are not there")
    backbone = load_backbone(f"local-dir:{model}", None, torch.device("cpu"))
    learner = tuned(backbone, 0.1)
    names = sorted(path.name.replace("_", " ") for path in folder.iterdir())
    classes = backbone.class_embeddings(names, ("a photo of a {}.",))
    own = FoldedHead(backbone.scale * classes, torch.zeros(len(classes)))
    _, graph = export(backbone, learner, own)
    images = [preprocess(path.read_bytes(), backbone.preprocess) for path in photos]
    pixels = torch.from_numpy(np.stack(images))
    embeddings = torch.cat([learner.image_embeddings(part) for part in pixels.split(250)])
    frozen = torch.cat([backbone.image_embeddings(part) for part in pixels.split(250)])
    logits = embeddings @ own.weight.T
    assert (logits.argmax(dim=1) != (frozen @ own.weight.T).argmax(dim=1)).float().mean() > 0.1
    session = onnxruntime.InferenceSession(graph.to_bytes(), providers=["CPUExecutionProvider"])
    found = [session.run(OUTPUTS, {"images": part.numpy()})[0] for part in pixels.split(250)]
    in_graph = torch.from_numpy(np.concatenate(found))
    assert (in_graph - logits).abs().max() <= 1e-4
    assert torch.equal(in_graph.argmax(dim=1), logits.argmax(dim=1))
