"""Adapter, sample experts and visual prompts against METHOD 1, 4 and 5 written out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.timm_model import TimmModel
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.data.preprocess import preprocess
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.clip.open_tower import open_tower
from capt_train.clip.vision_tower import FeedForward
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.adapter import Adapters, DiffMannerAdapter
from capt_train.method.learner import Learner, make_learner
from capt_train.method.sample_experts import SampleExperts
from capt_train.method.visual_prompts import VisualPrompts
from capt_train.method.visual_tuner import VisualTuner
from capt_train.parts import members
from tests.configs import train_config

CHANGED = {"adapter_depth": 2, "experts": 2, "rank": 3}  # equal to the frozen at first
PROMPTED = {"adapter_depth": 2, "experts": 2, "prompt_depth": 2, "prompt_tokens": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tuner_of(
    tower: Any,
    adapter_depth: int = 0,
    experts: int = 0,
    rank: int = 8,
    prompt_depth: int = 0,
    prompt_tokens: int = 0,
) -> Any:
    """Return the parts of these sizes that the tower can have."""
    draw, parts = generator(), {}
    if adapter_depth:
        parts["adapter"] = Adapters(tower, adapter_depth)
    if experts and SampleExperts.obstacle(tower) is None:
        ffn = tower.ffn(tower.depth - 1)
        parts["sample-experts"] = SampleExperts(ffn, experts, rank, draw, tower.depth - 1)
    if prompt_depth:
        blocks = range(tower.depth)[-prompt_depth:]
        parts["visual-prompts"] = VisualPrompts(tower, blocks, prompt_tokens, draw)
    return VisualTuner(tower, parts)


def part_of(tuner: Any, name: str) -> Any:
    return dict(tuner.parts.items()).get(name)


def shake(module: nn.Module, scale: float = 0.3, seed: int = 7) -> Any:
    """Add noise to every parameter."""
    draw = generator(seed)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw)
    return module


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# Each part by itself, in float64.


def adapted_by_loops(
    adapter: Any, tokens: Tensor, grid: Any, leading: int, alpha: Tensor
) -> Tensor:
    """`X + α·DWConv3×3(LN(X))`: each patch sees the eight around it, each channel only itself."""
    found = tokens.clone()
    rows, columns = grid
    weight, bias = adapter.convolution.weight, adapter.convolution.bias
    for n, image in enumerate(tokens[:, leading:]):
        middle = image - image.mean(dim=-1, keepdim=True)
        spread = (middle.square().mean(dim=-1, keepdim=True) + adapter.norm.eps).sqrt()
        normal = middle / spread * adapter.norm.weight + adapter.norm.bias
        for row in range(rows):
            for column in range(columns):
                total = bias.clone()
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        r, c = row + down, column + right
                        if 0 <= r < rows and 0 <= c < columns:
                            seen = normal[r * columns + c]
                            total = total + weight[:, 0, down + 1, right + 1] * seen
                found[n, leading + row * columns + column] += alpha[n] * total
    return found


@pytest.mark.parametrize("leading", [0, 1, 4])
def test_the_adapter_is_the_methods_formula(leading):
    adapter = shake(DiffMannerAdapter(5, (2, 3))).double()
    tokens, alpha = randn(3, leading + 6, 5), torch.tensor([0.0, 0.4, 1.7], dtype=torch.float64)
    found = adapter(tokens, alpha[:, None, None])
    torch.testing.assert_close(found, adapted_by_loops(adapter, tokens, (2, 3), leading, alpha))
    assert torch.equal(found[:, :leading], tokens[:, :leading])
    assert torch.equal(found[0], tokens[0])
    one = adapter(tokens, torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(one[1], found[1])
    torch.testing.assert_close(adapter(tokens, None), adapter(tokens, torch.tensor(1.0).double()))


def test_a_folded_adapter_needs_no_alpha():
    adapter = shake(DiffMannerAdapter(5, (2, 3))).double()
    tokens, alpha = randn(2, 7, 5), torch.tensor(0.3, dtype=torch.float64)
    expected = adapter(tokens, alpha)
    adapter.fold(alpha)
    torch.testing.assert_close(adapter(tokens, None), expected)


def test_gradients_of_the_adapter_are_right():
    adapter = shake(DiffMannerAdapter(2, (2, 3))).double()
    names = [name for name, _ in adapter.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in adapter.parameters()]

    def run(tokens: Tensor, alpha: Tensor, *own: Tensor) -> Any:
        parameters = dict(zip(names, own, strict=True))
        return torch.func.functional_call(adapter, parameters, (tokens, alpha))

    tokens, alpha = randn(2, 7, 2).requires_grad_(), randn(2, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(run, (tokens, alpha, *values))


def a_ffn(width: int = 4, hidden: int = 6) -> FeedForward:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Linear(width, hidden).double(), nn.GELU(), nn.Linear(hidden, width).double()
    return FeedForward(*layers)


def experts_of(ffn: FeedForward, count: int = 3, rank: int = 2) -> Any:
    return shake(SampleExperts(ffn, count, rank, generator()).double())


def mixed_by_copies(experts: Any, ffn: FeedForward, tokens: Tensor, strength: float) -> Any:
    """Return `Σ_e g_e(x)·FFN_e(x)` with each expert as an FFN of its own, and the gates."""
    scores = tokens @ experts.router.weight.T + experts.router.bias
    gates = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    total = torch.zeros_like(tokens)
    for e in range(gates.shape[1]):
        first, second = copy.deepcopy(ffn.up), copy.deepcopy(ffn.down)
        first.weight.data += strength * (experts.first_down[e] @ experts.first_up[e]).T
        second.weight.data += strength * (experts.second_down[e] @ experts.second_up[e]).T
        inner = first(tokens)
        normal = torch.distributions.Normal(0.0, 1.0)
        total += gates[:, e : e + 1] * second(inner * normal.cdf(inner))  # GELU
    return total, gates


@pytest.mark.parametrize("strength", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_experts_are_copies_of_the_ffn_with_low_rank_updates(strength, count):
    ffn = a_ffn()
    experts = experts_of(ffn, count)
    tokens = randn(5, 4)
    added, gates = experts(ffn, tokens, torch.tensor(strength, dtype=torch.float64))
    frozen = ffn.down(functional.gelu(ffn.up(tokens)))
    expected, own_gates = mixed_by_copies(experts, ffn, tokens, strength)
    torch.testing.assert_close(frozen + added, expected)
    torch.testing.assert_close(gates, own_gates)
    if strength:
        assert (added.abs() > 1e-3).any()
        unfolded = added
        experts.fold(torch.tensor(0.0), torch.tensor(strength, dtype=torch.float64))
        torch.testing.assert_close(experts(ffn, tokens, None)[0], unfolded)
    else:
        assert not added.any()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 33, 64])
def test_new_experts_add_exactly_nothing_whatever_the_shapes(batch):
    draw = generator(batch)
    with torch.random.fork_rng():
        torch.manual_seed(batch)
        ffn = FeedForward(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
    experts = SampleExperts(ffn, 2, 8, draw)
    tokens = torch.randn(batch, 48, generator=draw)
    added, gates = experts(ffn, tokens, torch.tensor(1.0))
    assert not added.any()
    assert torch.equal(gates, torch.full((batch, 2), 0.5))
    shake(experts)
    added, _ = experts(ffn, tokens, torch.tensor(0.0))
    assert not added.any()


def test_gradients_of_the_experts_are_right():
    ffn = a_ffn(3, 4)
    experts = experts_of(ffn, 2, 2)
    names = [name for name, _ in experts.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in experts.parameters()]

    def run(tokens: Tensor, strength: Tensor, *own: Tensor) -> Any:
        parameters = dict(zip(names, own, strict=True))
        return torch.func.functional_call(experts, parameters, (ffn, tokens, strength))

    strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (randn(2, 3).requires_grad_(), strength, *values))


def test_new_experts_differ_from_one_another_in_what_they_will_learn():
    experts = SampleExperts(a_ffn(), 2, 2, generator())
    assert not torch.equal(experts.first_down[0], experts.first_down[1])
    assert not torch.equal(experts.second_down[0], experts.second_down[1])
    assert not experts.first_up.any() and not experts.second_up.any()


def test_prompts_stand_behind_the_own_tokens_and_replace_those_of_the_block_before():
    tower = open_tower(small_timm(depth=6, reg_tokens=1), (16, 16))
    prompts = VisualPrompts(tower, range(tower.depth)[-2:], 3, generator())
    tokens = torch.arange(2 * 6 * 24.0).reshape(2, 6, 24)  # two leading, four patches
    assert torch.equal(prompts.before_attention(3, tokens), tokens)
    first = prompts.before_attention(4, tokens)
    for n in range(2):
        own = prompts.vectors[0]
        assert torch.equal(first[n], torch.cat([tokens[n, :2], own, tokens[n, 2:]]))
    processed = first + 100
    second = prompts.before_attention(5, processed)
    for n in range(2):
        own = prompts.vectors[1]
        assert torch.equal(second[n], torch.cat([processed[n, :2], own, tokens[n, 2:] + 100]))


# All parts in a tower.

TOWERS: dict[str, dict[str, Any]] = {
    "token": {"image_size": [16, 24], "layers": 4},
    "layer scale": {"ls_init_value": 0.5, "layers": 4},
    "mean": {"pool_type": "avg", "layers": 4},
    "attention pooling": {
        "attentional_pool": True,
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 2,
        "layers": 4,
    },
}


@pytest.fixture(scope="session")
def make_backbone(write_model: Callable[..., Path]) -> Callable[[str], Backbone]:
    made: dict[str, Backbone] = {}

    def make(name: str) -> Backbone:
        if name not in made:
            folder = write_model(vision_cfg=TOWERS[name])
            made[name] = load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
            shake(made[name].model.visual, 0.1)  # no norm is like another
        return made[name]

    return make


def some_pixels(backbone: Backbone, count: int = 5, seed: int = 2) -> Tensor:
    shape = (count, *backbone.preprocess.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def small_timm(**options: Any) -> Any:
    """Return a timm ViT as open_clip wraps it."""
    own = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TimmModel.__new__(TimmModel)
        nn.Module.__init__(model)
        model.trunk = shake(VisionTransformer(**own, **options), 0.2)
        model.head = nn.Sequential(nn.Linear(24, 16, bias=False))
    return model.eval().requires_grad_(False)


def written_out(
    visual: Any, tuner: VisualTuner, images: Tensor, alpha: Tensor, strength: float
) -> Tensor:
    """Return unit-norm features of an open_clip ViT with all trained parts, from its modules."""
    tokens = visual._embeds(images)
    blocks = visual.transformer.resblocks
    ends_in_token = visual.attn_pool is None and visual.pool_type == "tok"
    count = 0
    prompts, experts = part_of(tuner, "visual-prompts"), part_of(tuner, "sample-experts")
    adapters = part_of(tuner, "adapter").blocks
    for index, block in enumerate(blocks):
        place = index - len(blocks) + (0 if prompts is None else len(prompts.vectors))
        if prompts is not None and place >= 0:  # the last blocks have prompts
            own = prompts.vectors[place]
            rows = [torch.cat([t[:1], own, t[1 + count :]]) for t in tokens]
            tokens, count = torch.stack(rows), len(own)
        query = block.ln_1(tokens)
        tokens = tokens + block.ls_1(block.attn(query, query, query, need_weights=True)[0])
        if str(index) in adapters:
            adapter = adapters[str(index)]
            grid = visual.grid_size
            tokens = adapted_by_loops(adapter, tokens, grid, 1 + count, strength * alpha)
        inner = block.ln_2(tokens)
        output = block.mlp(inner)
        if experts is not None and block is blocks[-1]:
            ffn = FeedForward(block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj)
            output[:, 0] = mixed_by_copies(experts, ffn, inner[:, 0], strength)[0]
        tokens = tokens + block.ls_2(output)
    if not ends_in_token:
        tokens = torch.cat([tokens[:, :1], tokens[:, 1 + count :]], dim=1)
    features = visual._pool(tokens)[0] @ visual.proj
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("parts", [CHANGED, PROMPTED], ids=["changed", "prompted"])
@pytest.mark.parametrize("name", TOWERS)
def test_all_parts_together_are_the_method(make_backbone, name, parts):
    backbone = make_backbone(name)
    visual = copy.deepcopy(backbone.model.visual).double()
    tower = open_tower(visual, backbone.preprocess.size)
    tuner = shake(tuner_of(tower, **parts)).double()
    tuner.set_constants(strength=0.5)
    ends_in_token = name in ("token", "layer scale")
    assert (part_of(tuner, "sample-experts") is not None) is ends_in_token
    assert [*part_of(tuner, "adapter").blocks] == (["1", "2"] if ends_in_token else ["2", "3"])
    pixels = some_pixels(backbone)
    images = backbone.normalise(pixels).double()
    alpha = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.5], dtype=torch.float64)
    encoded = tuner(tower, tuner.prefix(tower, images), alpha)
    expected = written_out(visual, tuner, images, alpha, 0.5)
    torch.testing.assert_close(encoded.embeddings, expected.float(), rtol=0, atol=1e-6)
    assert bool(encoded.gates) is ends_in_token
    frozen = backbone.image_embeddings(pixels)
    assert (encoded.embeddings - frozen).abs().max() > 0.01
    # the constant holds where no image has its own
    tuner.set_constants(alpha=0.6)
    constant = tuner(tower, tuner.prefix(tower, images)).embeddings
    expected = written_out(visual, tuner, images, torch.full((5,), 0.6).double(), 0.5)
    torch.testing.assert_close(constant, expected.float(), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"reg_tokens": 2}, {"global_pool": "avg"}, {"init_values": 0.3}]
)
def test_a_timm_vit_is_changed_in_the_same_places(options):
    """Against timm's own forward pass, with hooks that change what its modules return."""
    visual = small_timm(depth=4, **options).double()
    tower = open_tower(visual, (16, 16))
    tuner = shake(tuner_of(tower, **CHANGED)).double()
    tuner.set_constants(strength=0.5)
    images, alpha = randn(3, 3, 16, 16), torch.tensor([0.2, 0.8, 1.1], dtype=torch.float64)
    handles = []
    for name, adapter in part_of(tuner, "adapter").blocks.items():
        block = visual.trunk.blocks[int(name)]
        own = (adapter, (2, 2), visual.trunk.num_prefix_tokens, 0.5 * alpha)
        handles += [
            block.register_forward_pre_hook(lambda m, a: m.__dict__.update(before=a[0])),
            # attention's skip follows this identity or layer scale: the change goes in there
            block.drop_path1.register_forward_hook(
                lambda m, a, out, block=block, own=own: (
                    out
                    + adapted_by_loops(own[0], block.before + out, *own[1:])
                    - (block.before + out)
                )
            ),
        ]
    experts = part_of(tuner, "sample-experts")
    if experts is not None:
        mlp = visual.trunk.blocks[-1].mlp

        def mix(module: Any, arguments: Any, output: Tensor) -> Tensor:
            ffn = FeedForward(mlp.fc1, mlp.act, mlp.fc2)
            output[:, 0] = mixed_by_copies(experts, ffn, arguments[0][:, 0], 0.5)[0]
            return output

        handles.append(mlp.register_forward_hook(mix))
    expected = functional.normalize(visual(images), dim=-1).float()
    for handle in handles:
        handle.remove()
    assert (part_of(tuner, "sample-experts") is None) is ("global_pool" in options)
    found = tuner(tower, tuner.prefix(tower, images), alpha).embeddings
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - functional.normalize(visual(images), dim=-1)).abs().max() > 0.01


# Identity.


def learner_of(
    backbone: Backbone,
    added: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Learner:
    """Return a new learner with adapter and sample experts, as far as not taken out."""
    both = (part for part in ("adapter", "sample-experts") if part not in members(without))
    parts = {"added": (*both, *added), "without": without}
    config = train_config(data="", model="", method="coop", **parts, **settings)
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    return make_learner(backbone, config, split, zero_shot)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_new_parts_leave_every_bit_as_it_is(make_backbone, name, count):
    backbone = make_backbone(name)
    learner = learner_of(backbone)
    assert len(part_of(learner.visual, "adapter").blocks) == 3
    pixels = some_pixels(backbone, count)
    frozen = backbone.image_embeddings(pixels)
    assert torch.equal(learner.image_embeddings(pixels), frozen)
    tokens = learner.prefix(pixels)
    short = learner.images(tokens, shortcut=True).embeddings
    torch.testing.assert_close(short, frozen, rtol=0, atol=1e-5)
    torch.testing.assert_close(learner.embed_tokens(tokens), frozen, rtol=0, atol=1e-5)
    shake(learner)
    assert (learner.image_embeddings(pixels) - frozen).abs().max() > 0.01
    learner.visual.set_constants(strength=0.0)
    assert torch.equal(learner.image_embeddings(pixels), frozen)


@pytest.mark.parametrize("count", [1, 64])
def test_new_parts_leave_every_bit_of_real_photos_as_it_is(shared, count):
    model = shared / "models/tinyclip-cifar"
    photos = sorted((shared / "data/cifar100/val").glob("*/*.png"))[::31][:count]
    if not photos or not model.is_dir():
        pytest.skip("the shared model or its photos are not there")
    backbone = load_backbone(f"local-dir:{model}", None, torch.device("cpu"))
    own = [preprocess(path.read_bytes(), backbone.preprocess) for path in photos]
    pixels = torch.from_numpy(np.stack(own))
    learner = learner_of(backbone)
    frozen = backbone.image_embeddings(pixels)
    assert torch.equal(learner.image_embeddings(pixels), frozen)
    short = learner.images(learner.prefix(pixels), shortcut=True).embeddings
    torch.testing.assert_close(short, frozen, rtol=0, atol=1e-5)
    shake(learner.visual, 0.05)
    assert (learner.image_embeddings(pixels) - frozen).abs().max() > 0.01
    learner.visual.set_constants(strength=0.0)
    assert torch.equal(learner.image_embeddings(pixels), frozen)


@torch.no_grad()
def test_the_shortcut_gives_the_same_with_trained_parts(make_backbone):
    for name in TOWERS:
        for added in ((), ("visual-prompts",)):
            backbone = make_backbone(name)
            learner = shake(learner_of(backbone, added=added))
            tokens = learner.prefix(some_pixels(backbone))
            alpha = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.5])
            whole, short = (learner.images(tokens, alpha, shortcut=s) for s in (False, True))
            torch.testing.assert_close(short.embeddings, whole.embeddings, rtol=0, atol=1e-5)
            torch.testing.assert_close(short.gates, whole.gates, rtol=0, atol=1e-5)


# What is trained, and where the frozen part ends.


def start_of(backbone: Backbone, **sizes: int) -> int:
    return tuner_of(backbone.tower, **sizes).start


def test_as_much_as_possible_is_frozen(make_backbone):
    token, mean = make_backbone("token"), make_backbone("mean")  # four blocks
    assert start_of(token, adapter_depth=3) == 0
    assert start_of(token, adapter_depth=1, experts=2) == 2
    assert start_of(token, adapter_depth=99) == 0
    assert start_of(token, experts=2) == 3
    assert start_of(mean, adapter_depth=3) == 1
    prompts = {"prompt_tokens": 2}
    assert start_of(token, experts=2, prompt_depth=1, **prompts) == 2
    assert start_of(token, adapter_depth=2, prompt_depth=1, **prompts) == 1
    assert start_of(token, adapter_depth=1, prompt_depth=3, **prompts) == 0
    assert start_of(token, adapter_depth=1, prompt_depth=99, **prompts) == -1


@torch.no_grad()
def test_cached_tokens_depend_on_nothing_that_is_trained(make_backbone):
    backbone = make_backbone("token")
    for added in ((), ("visual-prompts",)):
        learner = learner_of(backbone, added=added)
        pixels = some_pixels(backbone)
        before = learner.prefix(pixels)
        learner.visual.set_constants(alpha=0.2, strength=0.1)
        assert torch.equal(shake(learner).prefix(pixels), before)


def test_embedding_cached_tokens_in_parts_keeps_their_order(make_backbone, monkeypatch):
    backbone = make_backbone("token")
    learner = shake(learner_of(backbone))
    tokens = learner.prefix(some_pixels(backbone, 7))
    whole = learner.embed_tokens(tokens)
    monkeypatch.setattr("capt_train.method.learner._EMBEDDED_AT_ONCE", 3)
    torch.testing.assert_close(learner.embed_tokens(tokens), whole, rtol=0, atol=1e-6)
    assert not whole.requires_grad


def test_images_do_not_see_one_another(make_backbone):
    backbone = make_backbone("token")
    learner = shake(learner_of(backbone, added=("visual-prompts",)))
    pixels = some_pixels(backbone, 4)
    together = learner.image_embeddings(pixels)
    for n in range(4):
        alone = learner.image_embeddings(pixels[n : n + 1])[0]
        torch.testing.assert_close(alone, together[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("without", "adapter", "experts", "prompts"),
    [
        ((), True, True, False),
        (("adapter",), False, True, False),
        (("sample-experts",), True, False, False),
        (("experts", "adapter"), None, None, None),
    ],
)
def test_each_part_can_be_left_out_alone(make_backbone, without, adapter, experts, prompts):
    visual = learner_of(make_backbone("token"), without=without).visual
    if adapter is None:
        assert visual is None
        return
    assert (part_of(visual, "adapter") is not None) is adapter
    assert (part_of(visual, "sample-experts") is not None) is experts
    assert (part_of(visual, "visual-prompts") is not None) is prompts


def test_sizes_are_the_settings(make_backbone):
    sizes = {"visual_adapter_depth": 2, "experts_count": 3, "experts_rank": 5}
    prompts = {"visual_prompt_depth": 9, "visual_prompt_tokens": 6}
    learner = learner_of(make_backbone("token"), added=("visual-prompts",), **sizes, **prompts)
    visual = learner.visual
    assert [*part_of(visual, "adapter").blocks] == ["1", "2"]
    assert part_of(visual, "sample-experts").first_down.shape == (3, 32, 5)
    assert part_of(visual, "sample-experts").second_up.shape == (3, 5, 32)
    assert part_of(visual, "visual-prompts").vectors.shape == (
        4,
        6,
        32,
    )  # no more than there are blocks
    assert {*map(id, learner.visual_parameters)} == {*map(id, visual.parameters())}
    assert all(value.requires_grad for value in learner.visual_parameters)
    both = len(learner.text_parameters) + len(learner.visual_parameters)
    assert both == len([*learner.parameters()])


def test_the_seed_decides_the_start(make_backbone):
    backbone = make_backbone("token")
    one, same, other = (
        learner_of(backbone, added=("visual-prompts",), seed=seed).visual.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("parts.sample-experts.first_down", "parts.visual-prompts.vectors"):
        assert not torch.equal(one[name], other[name])


BEHIND_ZEROS = ("norm.weight", "norm.bias", "first_down", "second_down", "router.weight")


@pytest.mark.parametrize("name", ["token", "mean"])
def test_steps_move_all_that_is_trained_and_nothing_else(make_backbone, name):
    backbone = make_backbone(name)
    learner = learner_of(backbone, added=("visual-prompts",), without=("prompt",))
    frozen = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    constants = learner.visual.alpha.clone(), learner.visual.strength.clone()
    optimizer = torch.optim.SGD(learner.visual_parameters, lr=0.5)
    tokens = learner.prefix(some_pixels(backbone, 6))
    targets = functional.normalize(torch.randn(6, 32, generator=generator(8)), dim=-1)
    moved: list[set[str]] = []
    for _ in range(2):
        before = {key: value.clone() for key, value in learner.visual.named_parameters()}
        encoded = learner.images(tokens, torch.linspace(0.2, 1, 6), shortcut=True)
        loss = -(encoded.embeddings * targets).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = dict(learner.visual.named_parameters())
        moved.append({key for key in before if not torch.equal(before[key], after[key])})
    everything = {key for key, _ in learner.visual.named_parameters()}
    waiting = {
        key
        for key in everything
        if key.endswith(BEHIND_ZEROS) or key.endswith("experts.router.bias")
    }
    assert moved[0] == everything - waiting
    assert moved[1] == everything
    assert all(value.grad is None for value in backbone.model.parameters())
    assert not any(value.requires_grad for value in backbone.model.parameters())
    now = backbone.model.state_dict()
    assert frozen.keys() == now.keys()
    assert all(torch.equal(frozen[key], now[key]) for key in frozen)
    assert torch.equal(learner.visual.alpha, constants[0])
    assert torch.equal(learner.visual.strength, constants[1])


def test_alpha_and_strength_are_no_parameters_and_only_alpha_is_saved(make_backbone):
    tuner = tuner_of(make_backbone("token").tower, **CHANGED)
    tuner.set_constants(alpha=0.25)
    tuner.set_constants(strength=0.75)
    assert (float(tuner.alpha), float(tuner.strength)) == (0.25, 0.75)
    assert not {"alpha", "strength"} & {name for name, _ in tuner.named_parameters()}
    other = tuner_of(make_backbone("token").tower, **CHANGED)
    other.load_state_dict(tuner.state_dict())
    assert (float(other.alpha), float(other.strength)) == (0.25, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("parts", [CHANGED, PROMPTED], ids=["changed", "prompted"])
@pytest.mark.parametrize("name", ["token", "mean"])
def test_a_folded_copy_says_the_same_and_the_original_stays(make_backbone, name, parts):
    backbone = make_backbone(name)
    tower = backbone.tower
    tuner = shake(tuner_of(tower, **parts))
    tuner.set_constants(alpha=0.7, strength=0.5)
    before = {key: value.clone() for key, value in tuner.state_dict().items()}
    tokens = tuner.prefix(tower, backbone.normalise(some_pixels(backbone)))
    expected = tuner(tower, tokens).embeddings
    folded = tuner.folded()
    assert folded.alpha is None and folded.strength is None
    assert "alpha" not in folded.state_dict()
    torch.testing.assert_close(folded(tower, tokens).embeddings, expected, rtol=0, atol=1e-6)
    after = tuner.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(tuner(tower, tokens).embeddings, expected)
    for constants in (
        {"alpha": 1.0, "strength": 1.0},
        {"alpha": 0.7, "strength": 0.0},
    ):
        tuner.set_constants(**constants)
        other = tuner(tower, tokens).embeddings
        assert (other - expected).abs().max() > 1e-3
        again = tuner.folded()(tower, tokens).embeddings
        torch.testing.assert_close(again, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_prompts_beside_registers_of_a_tower_without_a_class_token():
    visual = small_timm(depth=3, class_token=False, reg_tokens=1, global_pool="avg")
    trunk = visual.trunk
    tower = open_tower(visual, (16, 16))
    parts = {"prompt_depth": 1, "prompt_tokens": 2}
    tuner = shake(tuner_of(tower, **parts), 1.0)
    images = randn(2, 3, 16, 16).float()
    found = tuner(tower, tuner.prefix(tower, images)).embeddings
    tokens = trunk._pos_embed(trunk.patch_embed(images))
    tokens = trunk.blocks[1](trunk.blocks[0](tokens))
    own = part_of(tuner, "visual-prompts").vectors[0].expand(2, -1, -1)
    tokens = trunk.blocks[2](torch.cat([tokens[:, :1], own, tokens[:, 1:]], dim=1))
    mean = trunk.fc_norm(tokens[:, 3:].mean(dim=1))  # patches only
    expected = functional.normalize(visual.head(mean), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
