"""LoRA and tuned LayerNorms: updates of the frozen tower's weights, merged at export."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, left_out, make_learner
from export.graph.onnx_graph import trace
from export.graph.visual import VisualClassifier
from export.source.fold import FoldedHead
from tests.configs import train_config

OPEN_CLIP: dict[str, Any] = {"layers": 4}
TIMM: dict[str, Any] = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "timm_proj": "linear",
    "image_size": 160,
}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
CONVNEXT: dict[str, Any] = {
    "timm_model_name": "test_convnext",
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "image_size": 64,
}


def opened(write_model: Any, vision: dict[str, Any]) -> Backbone:
    return load_backbone(f"local-dir:{write_model(vision_cfg=vision)}", None, torch.device("cpu"))


def learner_of(backbone: Backbone, *parts: str, noise: float = 0.0, **settings: Any) -> Learner:
    config = train_config(data="", model="", method="coop", added=parts, **settings)
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(split.class_names, ("{}",))
    learner = make_learner(backbone, config, split, zero_shot)
    draw = torch.Generator().manual_seed(3)
    for parameter in learner.visual_parameters:
        parameter.data += noise * torch.randn(parameter.shape, generator=draw)
    return learner


def some_pixels(backbone: Backbone) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    shape = (3, *backbone.preprocess.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)


@pytest.mark.parametrize("vision", [OPEN_CLIP, TIMM], ids=["open_clip", "timm"])
@pytest.mark.parametrize("part", ["lora", "layer-norm"])
@torch.no_grad()
def test_a_new_part_changes_nothing_to_the_bit(write_model, vision, part):
    backbone = opened(write_model, vision)
    learner = learner_of(backbone, part)
    assert learner.visual is not None
    pixels = some_pixels(backbone)
    tokens = learner.prefix(pixels)
    before = learner.images(tokens).embeddings
    assert torch.equal(before, backbone.image_embeddings(pixels))
    for parameter in learner.visual_parameters:
        parameter.data += 1.0
    assert not torch.allclose(learner.images(tokens).embeddings, before, atol=1e-3)
    learner.visual.set_constants(strength=0.0)
    assert torch.equal(learner.images(tokens).embeddings, before)


@pytest.mark.parametrize("depth", [1, 2, 9])
@torch.no_grad()
def test_lora_adds_a_product_to_query_key_value_and_both_ffn_layers(write_model, depth):
    backbone = opened(write_model, OPEN_CLIP)
    learner = learner_of(backbone, "lora", noise=0.5, visual_lora_depth=depth, visual_lora_rank=3)
    learner.set_strength(0.5)
    part: Any = learner.visual.parts["lora"]  # type: ignore[union-attr]
    other = copy.deepcopy(backbone)
    blocks = range(max(0, 4 - depth), 4)
    factors = zip(part.products.down, part.products.up, strict=True)
    for block in blocks:
        layers = other.model.visual.transformer.resblocks[block]
        for weight, stack in (
            (layers.attn.in_proj_weight, 3),
            (layers.mlp.c_fc.weight, 1),
            (layers.mlp.c_proj.weight, 1),
        ):
            down, up = next(factors)
            assert down.shape == (stack, 3, weight.shape[1])
            for matrix, (a, b) in zip(weight.chunk(stack), zip(down, up, strict=True), strict=True):
                matrix.add_(0.5 * 0.1 * b @ a)
    assert next(factors, None) is None
    pixels = some_pixels(backbone)
    expected = other.image_embeddings(pixels)
    assert (expected - backbone.image_embeddings(pixels)).abs().max() > 1e-3
    torch.testing.assert_close(learner.image_embeddings(pixels), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_tuned_norms_have_other_gains_and_biases(write_model):
    backbone = opened(write_model, CONVNEXT)
    for name, value in backbone.model.visual.named_parameters():
        if name.endswith("gamma"):  # before training it all but takes the blocks out
            value.fill_(1.0)
    learner = learner_of(backbone, "layer-norm", noise=2.0, visual_norm_depth=2)
    part: Any = learner.visual.parts["layer-norm"]  # type: ignore[union-attr]
    updates = part.weight_updates()
    assert updates
    other = copy.deepcopy(backbone)
    for name, update in updates.items():
        assert "norm" in name
        other.model.visual.get_parameter(name).add_(update)
    pixels = some_pixels(backbone)
    expected = other.image_embeddings(pixels)
    assert (expected - backbone.image_embeddings(pixels)).abs().max() > 1e-3
    torch.testing.assert_close(learner.image_embeddings(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision", [OPEN_CLIP, TIMM], ids=["open_clip", "timm"])
@pytest.mark.parametrize("parts", [("lora", "layer-norm"), ("lora", "adapter")])
@torch.no_grad()
def test_the_exported_tower_has_the_updates_in_its_weights(write_model, vision, parts):
    backbone = opened(write_model, vision)
    learner = learner_of(backbone, *parts, noise=0.3)
    learner.set_strength(0.5)
    draw = torch.Generator().manual_seed(0)
    head = FoldedHead(20 * torch.randn(5, 32, generator=draw), torch.zeros(5))
    network = VisualClassifier(backbone, head, learner.visual).eval()
    pixels = some_pixels(backbone)
    embeddings = learner.image_embeddings(pixels)
    assert (embeddings - backbone.image_embeddings(pixels)).abs().max() > 1e-2
    torch.testing.assert_close(network(pixels)[2], embeddings, atol=2e-6, rtol=0)
    torch.testing.assert_close(network(pixels)[0], embeddings @ head.weight.T, atol=1e-4, rtol=0)
    remaining = [] if network.tuner is None else [*network.tuner.parts]
    assert remaining == [part for part in parts if part == "adapter"]
    if remaining:
        return
    plain = VisualClassifier(backbone, head).eval()
    sizes = [
        len(onnx.load_from_string(trace(one, *backbone.preprocess.size).to_bytes()).graph.node)
        for one in (network, plain)
    ]
    assert sizes[0] == sizes[1]


def test_towers_that_cannot_have_a_part_say_why(write_model):
    backbone = opened(write_model, RESNET)
    config = train_config(data="", model="", method="coop", added=("lora", "layer-norm"))
    said = left_out(backbone, config)
    assert said == [
        "LoRA needs the attention and FFN of a ViT; left out: lora",
        "the visual tower has BatchNorm, not LayerNorm; left out: layer-norm",
    ]
