from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.timm_model import TimmModel
from timm import create_model
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional

from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.clip.open_tower import open_tower
from capt_train.clip.vision_tower import EvaTower, OpenClipTower, TimmTower
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import left_out, make_learner
from capt_train.method.visual_prompts import VisualPrompts
from tests.configs import train_config

BOTH = ("adapter", "sample-experts")
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "token": {},
    "oblong": {"image_size": [16, 32], "layers": 3},
    "layer scale": {"ls_init_value": 0.3},
    "mean": {"pool_type": "avg"},
    "norm after mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "no first norm": {"no_ln_pre": True},
    "attention pooling": {
        "attentional_pool": True,
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 2,
    },
    "attention pooling twice": {
        "attentional_pool": "cascade",
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 2,
    },
    "tokens as well": {"output_tokens": True},
}
TIMM: dict[str, dict[str, Any]] = {
    "timm token": {},
    "timm oblong": {"img_size": (16, 32)},
    "timm mean": {"global_pool": "avg"},
    "timm layer scale": {"init_values": 0.3},
    "timm registers": {"reg_tokens": 2, "no_embed_class": True},
    "timm without class token": {"class_token": False, "global_pool": "avg"},
    "timm attention pooling": {"global_pool": "map"},
    "timm first norm": {"pre_norm": True, "act_layer": "quick_gelu"},
    "timm free size": {"dynamic_img_size": True},
}
EXPECTED = {  # leading tokens, ends in a class token
    **dict.fromkeys(
        ("token", "oblong", "layer scale", "no first norm", "tokens as well"), (1, True)
    ),
    **dict.fromkeys(("mean", "norm after mean"), (1, False)),
    **dict.fromkeys(("attention pooling", "attention pooling twice"), (1, False)),
    **dict.fromkeys(("timm token", "timm oblong", "timm layer scale"), (1, True)),
    **dict.fromkeys(("timm first norm", "timm free size"), (1, True)),
    "timm registers": (3, True),
    "timm mean": (1, False),
    "timm without class token": (0, False),
    "timm attention pooling": (1, False),
}


def in_timm_model(trunk: nn.Module) -> Any:
    """Return the trunk as open_clip wraps it."""
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk = trunk
    model.head = nn.Sequential(nn.Linear(trunk.num_features, 16, bias=False))
    return model.eval().requires_grad_(False)


def small_timm(seed: int = 0, **options: Any) -> Any:
    own = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = VisionTransformer(**{**own, "num_classes": 0, **options})
        for parameter in trunk.parameters():  # timm's own start is all but zero
            parameter.data += 0.2 * torch.randn(parameter.shape)
        return in_timm_model(trunk)


@pytest.fixture(scope="session")
def make_visual(write_model: Callable[..., Path]) -> Callable[[str], tuple[Any, tuple[int, int]]]:
    """Return a function from a name above to a visual tower and its image size."""
    made: dict[str, tuple[Any, tuple[int, int]]] = {}

    def make(name: str) -> tuple[Any, tuple[int, int]]:
        if name not in made and name in TIMM:
            visual = small_timm(**TIMM[name])
            made[name] = visual, tuple(visual.trunk.patch_embed.img_size)
        elif name not in made:
            folder = write_model(vision_cfg={"layers": 3, **OPEN_CLIP[name]})
            backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
            made[name] = backbone.model.visual, backbone.preprocess.size
            draw = torch.Generator().manual_seed(2)
            for value in backbone.model.visual.parameters():  # no norm is like another
                value.data += 0.1 * torch.randn(value.shape, generator=draw)
        return made[name]

    return make


def some_images(size: tuple[int, int], count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def features_of(visual: Any, images: torch.Tensor) -> torch.Tensor:
    found = visual(images)
    return found[0] if isinstance(found, tuple) else found


def record(modules: dict[str, nn.Module]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Keep the first input and the output of some modules."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            seen[f"{name} in"], seen[f"{name} out"] = arguments[0], output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    return seen, lambda: [handle.remove() for handle in handles]  # type: ignore[func-returns-value]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_vit_is_taken_apart_and_says_what_it_is(make_visual, name):
    visual, size = make_visual(name)
    tower = open_tower(visual, size)
    assert isinstance(tower, TimmTower if name in TIMM else OpenClipTower)
    assert (tower.leading, tower.pools_class_token) == EXPECTED[name]
    assert tower.depth == 3
    assert tower.width == (24 if name in TIMM else 32)
    assert tower.grid == (2, size[1] // 8)


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_each_piece_gives_what_the_towers_own_modules_give(make_visual, name):
    visual, size = make_visual(name)
    tower = open_tower(visual, size)
    blocks = visual.trunk.blocks if name in TIMM else visual.transformer.resblocks
    seen, forget = record(
        {str(i): block for i, block in enumerate(blocks)}
        | {f"mlp {i}": block.mlp for i, block in enumerate(blocks)}
    )
    images = some_images(size)
    features = features_of(visual, images)
    forget()
    tokens = tower.embed(images)
    for block in range(tower.depth):
        assert torch.equal(tokens, seen[f"{block} in"])
        attended = tower.attend(block, tokens)
        assert torch.equal(tower.before_ffn(block, attended), seen[f"mlp {block} in"])
        first = tower.attend(block, tokens, first_only=True)
        assert first.shape == attended[:, :1].shape
        torch.testing.assert_close(first, attended[:, :1], rtol=0, atol=1e-5)
        ffn = tower.ffn(block)
        inner = seen[f"mlp {block} in"]
        torch.testing.assert_close(
            ffn.down(ffn.activation(ffn.up(inner))), seen[f"mlp {block} out"], rtol=0, atol=1e-5
        )
        tokens = tower.feed(block, attended)
        assert torch.equal(tokens, seen[f"{block} out"])
    assert torch.equal(tower.pool(tokens), features)


@torch.no_grad()
@pytest.mark.parametrize("name", ["token", "layer scale", "timm token", "timm layer scale"])
def test_an_update_joins_the_ffns_output_in_front_of_its_layer_scale(make_visual, name):
    visual, size = make_visual(name)
    tower = open_tower(visual, size)
    block = visual.trunk.blocks[1] if name in TIMM else visual.transformer.resblocks[1]
    scale = block.ls2 if name in TIMM else block.ls_2
    gamma = getattr(scale, "gamma", torch.tensor(1.0))
    assert torch.equal(gamma, torch.full_like(gamma, 1.0)) is ("scale" not in name)
    tokens, update = some_tokens(tower, 1), some_tokens(tower, 2)
    found = tower.feed(1, tokens, update) - tower.feed(1, tokens)
    torch.testing.assert_close(found, gamma * update, rtol=0, atol=1e-5)


def some_tokens(tower: Any, seed: int) -> torch.Tensor:
    count = tower.leading + tower.grid[0] * tower.grid[1]
    return torch.randn(2, count, tower.width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", EXPECTED)
def test_ending_in_a_class_token_means_that_nothing_else_is_read(make_visual, name):
    visual, size = make_visual(name)
    tower = open_tower(visual, size)
    tokens = some_tokens(tower, 3)
    others = tokens.clone()
    others[:, 1:] += 1 + some_tokens(tower, 4)[:, 1:]
    same = torch.equal(tower.pool(tokens), tower.pool(others))
    assert same is tower.pools_class_token
    if same:
        assert torch.equal(tower.pool(tokens[:, :1]), tower.pool(tokens))


def test_a_distilled_vit_reads_two_tokens():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = create_model("deit_tiny_distilled_patch16_224", num_classes=0, depth=1)
    tower = open_tower(in_timm_model(trunk), (224, 224))
    assert tower is not None and tower.leading == 2
    assert not tower.pools_class_token


@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_a_rotary_vit_is_taken_apart(pool):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = create_model(
            "eva02_tiny_patch14_224", num_classes=0, depth=2, img_size=28, global_pool=pool
        )
    visual = in_timm_model(trunk)
    tower = open_tower(visual, (28, 28))
    assert isinstance(tower, EvaTower)
    assert (tower.depth, tower.grid) == (2, (2, 2))
    assert tower.pools_class_token == (pool == "token")
    assert VisualPrompts.obstacle(tower) == "the visual tower rotates the image's tokens alone"
    for name, stack in tower.linear_weights(1).items():
        assert tower.weight(name).shape[0] % stack == 0


@pytest.mark.parametrize("mlp", [GluMlp, SwiGLU], ids=["one gated layer", "two layers in"])
@torch.no_grad()
def test_a_gated_ffn_is_no_two_linear_layers(mlp):
    visual = small_timm(mlp_layer=mlp)
    tower = open_tower(visual, (16, 16))
    assert isinstance(tower, TimmTower)
    assert tower.ffn(0) is None


def test_an_ffn_with_a_norm_inside_is_no_two_linear_layers():
    class Normed(Mlp):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "norm_layer": nn.LayerNorm})

    tower = open_tower(small_timm(mlp_layer=Normed), (16, 16))
    assert isinstance(tower, TimmTower)
    assert tower.ffn(0) is None


@pytest.mark.parametrize(
    ("trunk", "size"),
    [
        ("vit_pwee_patch16_reg1_gap_256", 256),  # attention and FFN side by side
        ("xcit_nano_12_p16_224", 224),  # its attention needs the grid
    ],
)
def test_another_timm_model_is_left_alone(trunk, size):
    visual = in_timm_model(create_model(trunk, num_classes=0))
    assert open_tower(visual, (size, size)) is None


@pytest.mark.parametrize(
    "vision",
    [
        {"block_type": "custom", "qk_norm": True, "scale_attn": True},
    ],
    ids=["custom blocks"],
)
def test_another_open_clip_tower_is_left_alone_and_said(write_model, vision):
    folder = write_model(vision_cfg=vision)
    backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
    kind = type(backbone.model.visual).__name__
    assert backbone.tower is None
    config = train_config(data="", model="", method="full", prompt_depth=2)
    (said,) = left_out(backbone, config)
    assert kind in said
    assert "left out: adapter, sample-experts, visual-prompts, lora, layer-norm" in said
    assert left_out(backbone, train_config(data="", model="", method="coop")) == []
    (said,) = left_out(backbone, train_config(data="", model="", added=("sample-experts",)))
    assert said.endswith("left out: sample-experts")
    learner = learner_of(backbone, config)
    assert learner.visual is None
    assert learner.text_parameters and not learner.visual_parameters


def learner_of(backbone: Backbone, config: TrainConfig) -> Any:
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    return make_learner(backbone, config, split, zero_shot)


def test_what_a_tower_cannot_have_is_said(make_visual, tiny_model_dir):
    config = train_config(data="", model="", added=BOTH)
    no_experts = train_config(data="", model="", added=("adapter",))
    for visual, reason in (
        (make_visual("mean")[0], "does not end in a class token"),
        (small_timm(mlp_layer=GluMlp), "FFN is not two linear layers"),
    ):
        backbone = load_backbone(f"local-dir:{tiny_model_dir}", None, torch.device("cpu"))
        backbone.model.visual = visual
        (said,) = left_out(backbone, config)
        assert reason in said and said.endswith("left out: sample-experts")
        assert left_out(backbone, no_experts) == []
        learner = learner_of(backbone, config)
        assert [*learner.visual.parts] == ["adapter"]


def test_what_a_single_block_cannot_have_is_said(write_model):
    folder = write_model(vision_cfg={"layers": 1})
    backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
    config = train_config(data="", model="", added=BOTH)
    (said,) = left_out(backbone, config)
    assert said.endswith("left out: adapter")
    learner = learner_of(backbone, config)
    assert [*learner.visual.parts] == ["sample-experts"]
    assert learner_of(backbone, train_config(data="", model="", added=("adapter",))).visual is None


@pytest.mark.parametrize("name", ["token", "timm token"])
def test_a_tower_that_does_more_than_its_pieces_is_refused(make_visual, name):
    class Doubled(type(make_visual(name)[0])):  # type: ignore[misc]
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return functional.normalize(super().forward(images), dim=-1)  # type: ignore[no-any-return]

    visual, size = make_visual(name)
    other = Doubled.__new__(Doubled)
    other.__dict__.update(visual.__dict__)
    assert open_tower(other, size) is None


def test_opening_leaves_the_tower_and_the_random_numbers_alone(make_visual):
    visual, size = make_visual("timm registers")
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    open_tower(visual, size)
    assert torch.equal(torch.rand(3), expected)
    after = visual.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_open_clips_own_timm_model_can_be_reached(write_model):
    folder = write_model(
        vision_cfg={
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 160,
        }
    )
    backbone = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
    tower = backbone.tower
    assert isinstance(tower, TimmTower) and backbone.tower is tower  # opened once
    assert (tower.depth, tower.width, tower.grid) == (6, 64, (10, 10))
    assert left_out(backbone, train_config(data="", model="", added=BOTH)) == []
