"""Towers of feature maps in pieces: EfficientNet, ResNet, ConvNeXt, FastViT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from capt_train.clip.conv_tower import ConvTower
from capt_train.clip.loading import load_backbone
from capt_train.clip.open_tower import open_tower
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import left_out, make_learner
from tests.capt_train.clip.test_vision_tower import in_timm_model
from tests.configs import train_config
from tests.export.graph.test_convolutions import settled

BOTH = ("adapter", "sample-experts")
TRUNKS = ("tf_efficientnet_lite0", "resnet10t", "convnext_atto", "fastvit_t8")
SIZE = (64, 64)


def some_images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def opened() -> Callable[[str], tuple[Any, Any]]:
    made: dict[str, tuple[Any, Any]] = {}

    def open_one(name: str) -> tuple[Any, Any]:
        if name not in made:
            visual = in_timm_model(settled(create_model(name, num_classes=0)))
            made[name] = visual, open_tower(visual, SIZE)
        return made[name]

    return open_one


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_from_every_block_on_the_features_are_the_towers_to_the_bit(opened, name):
    visual, tower = opened(name)
    assert isinstance(tower, ConvTower)
    images = some_images(3)
    expected = visual(images)
    for start in range(tower.depth):
        tokens = tower.prefix(images, start)
        width, grid = tower.shape(start).width, tower.shape(start).grid
        assert tokens.shape == (3, grid[0] * grid[1], width)
        for block in range(start, tower.depth):
            tokens = tower.feed(block, tokens if block == start else tower.attend(block, tokens))
        assert torch.equal(tower.pool(tokens), expected)


@torch.no_grad()
def test_the_blocks_of_an_efficientnet_end_in_its_pooling(opened):
    visual, tower = opened("tf_efficientnet_lite0")
    assert tower.depth == sum(len(stage) for stage in visual.trunk.blocks) + 1
    assert tower.shape(tower.depth - 2).width == 320
    assert (tower.width, tower.grid) == (1280, (1, 1))
    images = some_images()
    pooled = visual.trunk.forward_head(visual.trunk.forward_features(images), pre_logits=True)
    assert torch.equal(tower.prefix(images, tower.depth - 1)[:, 0], pooled)


def test_open_clips_resnet_is_taken_apart_to_its_attention_pooling(write_model):
    vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 32}
    backbone = load_backbone(
        f"local-dir:{write_model(vision_cfg=vision)}", None, torch.device("cpu")
    )
    tower = backbone.tower
    assert isinstance(tower, ConvTower)
    assert tower.depth == 6
    assert left_out(backbone, train_config(data="", model="", added=BOTH)) == []
    (said,) = left_out(
        backbone,
        train_config(
            data="",
            model="",
            added=(
                *BOTH,
                "visual-prompts",
            ),
        ),
    )
    assert said.endswith("left out: visual-prompts")


class SideBySide(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return (self.first(images) + self.second(images)).mean(dim=(2, 3))


def test_layers_side_by_side_are_left_alone():
    assert open_tower(SideBySide(), (8, 8)) is None


@pytest.mark.parametrize("part", ["adapter", "sample-experts"])
@torch.no_grad()
def test_a_new_part_changes_nothing_to_the_bit_and_a_tuned_one_does(
    write_model: Callable[..., Path], part: str
):
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    }
    folder = write_model(vision_cfg=vision)
    backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
    settled(backbone.model.visual)
    config = train_config(data="", model="", method="coop", added=(part,))
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    learner = make_learner(
        backbone, config, split, backbone.class_embeddings(split.class_names, ("{}",))
    )
    assert learner.visual is not None and [*learner.visual.parts] == [part]
    pixels = (255 * some_images(3)).permute(0, 2, 3, 1).to(torch.uint8)
    expected = backbone.image_embeddings(pixels)
    assert torch.equal(learner.image_embeddings(pixels), expected)
    draw = torch.Generator().manual_seed(0)
    for parameter in learner.visual_parameters:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    assert (learner.image_embeddings(pixels) - expected).abs().max() > 1e-3
    learner.set_strength(0.0)
    assert torch.equal(learner.image_embeddings(pixels), expected)
