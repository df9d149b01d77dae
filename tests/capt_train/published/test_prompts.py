"""Prompts and weight updates of published methods, against towers run by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from capt_deploy.core.errors import ConfigError
from capt_train.clip.backbone import Backbone
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, make_learner
from tests.configs import train_config

NAMES = ("cat", "dog", "boat", "tree", "car", "sun", "moon")
SPLIT = FewShotSplit(NAMES, (0, 1, 2, 3, 4, 5), (), (), {})


def make(backbone: Backbone, *parts: str, **settings: Any) -> Learner:
    """Return a learner whose parameters have moved a little."""
    settings = {"prompt_depth": 2, "visual_prompt_depth": 2, "visual_prompt_tokens": 2, **settings}
    config = train_config(data="", model="", method="zeroshot", added=parts, **settings)
    zero_shot = backbone.class_embeddings(NAMES, ["a photo of a {}."])
    learner = make_learner(backbone, config, SPLIT, zero_shot)
    generator = torch.Generator().manual_seed(3)
    for parameter in learner.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner


def pixels(count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=draw)


@torch.no_grad()
def test_cocoop_shifts_the_context_of_each_image(tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, "image-prompt")
    (prompt,) = learner.prompts
    images = tiny_backbone.image_embeddings(pixels())
    assert learner.reads_images and learner.obstacle is not None
    logits, _ = learner.answer(images, [4, 1])
    first, _, last = prompt.network
    for place, image in enumerate(images):
        hidden = relu(first.weight @ image + first.bias)
        context = prompt.context + last.weight @ hidden + last.bias
        tokens = tiny_backbone.tokenize(["a a a a car.", "a a a a dog."])
        texts = tiny_backbone.text.encode(tokens, context)
        expected = tiny_backbone.scale * image @ texts.T
        torch.testing.assert_close(logits[0, place], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.logits(images, [4, 1]), logits[0])


@torch.no_grad()
def test_tac_puts_mapped_cluster_centres_before_the_context(tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, "cluster-prompt", "text-prompts", prompt_words="photo")
    (prompt,) = learner.prompts
    assert prompt.centres.shape == (5, 32)
    front = torch.stack([prompt.front.weight @ c + prompt.front.bias for c in prompt.centres])
    tokens = tiny_backbone.tokenize([f"{'a ' * 6}tree."])
    deeper = torch.cat([front, prompt.deeper[0]])[None]
    expected = tiny_backbone.text.encode(tokens, torch.cat([front, prompt.context]), deeper)
    torch.testing.assert_close(learner.texts([3]).embeddings[0], expected)
    torch.testing.assert_close(prompt.of_names(["tree"]), expected)


@torch.no_grad()
def test_maple_maps_text_vectors_to_visual_tokens(tiny_backbone: Backbone) -> None:
    parts = ("prompt", "text-prompts", "coupled-prompts")
    learner = make(tiny_backbone, *parts, prompt_words="a photo")
    (prompt,), part = learner.prompts, learner.tuner.parts["coupled-prompts"]
    visual = tiny_backbone.model.visual
    tokens = visual._embeds(tiny_backbone.normalise(pixels()))
    for block, of_text in enumerate((prompt.context, prompt.deeper[0])):
        own = of_text @ part.maps[block].weight.T + part.maps[block].bias
        rest = tokens[:, 1:] if block == 0 else tokens[:, 3:]
        tokens = torch.cat([tokens[:, :1], own.expand(len(tokens), -1, -1), rest], dim=1)
        tokens = visual.transformer.resblocks[block](tokens)
    pooled, _ = visual._pool(tokens)
    expected = normalize(pooled @ visual.proj, dim=-1)
    torch.testing.assert_close(learner.image_embeddings(pixels()), expected, rtol=1e-4, atol=1e-5)
    assert {id(p) for p in learner.text_parameters} & {
        id(p) for p in learner.visual_parameters
    } == set()


def test_maple_needs_a_prompt_beside_it(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="coupled-prompts: expected the part prompt"):
        make(tiny_backbone, "coupled-prompts")


@torch.no_grad()
def test_ivlp_has_tokens_in_the_first_blocks(tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, "first-prompts", visual_prompt_depth=1)
    part = learner.tuner.parts["first-prompts"]
    assert part.blocks == range(1) and learner.tuner.start == -1
    visual = tiny_backbone.model.visual
    tokens = visual._embeds(tiny_backbone.normalise(pixels()))
    own = part.vectors[0].expand(len(tokens), -1, -1)
    tokens = torch.cat([tokens[:, :1], own, tokens[:, 1:]], dim=1)
    for block in visual.transformer.resblocks:
        tokens = block(tokens)
    pooled, _ = visual._pool(tokens)
    expected = normalize(pooled @ visual.proj, dim=-1)
    torch.testing.assert_close(learner.image_embeddings(pixels()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "visual", "named"),
    [("text-lora", "visual-lora", "in_proj_weight"), ("text-norms", "visual-norms", "ln_")],
)
@torch.no_grad()
def test_updates_are_those_of_a_model_with_changed_weights(
    text: str, visual: str, named: str, tiny_backbone: Backbone
) -> None:
    learner = make(tiny_backbone, text, visual)
    changed = copy.deepcopy(tiny_backbone)
    updates = learner.prompts[0].weight_updates()
    assert all(named in name for name in updates)
    blocks = {name.split("resblocks.")[1].split(".")[0] for name in updates if "resblocks" in name}
    assert blocks == {"0", "1"}
    for name, update in updates.items():
        changed.model.get_parameter(name).add_(update)
    for name, update in learner.tuner.parts[visual].weight_updates().items():
        assert named in name
        changed.model.visual.get_parameter(name).add_(update)
    expected = changed.class_embeddings(NAMES, ["a photo of a {}."])
    torch.testing.assert_close(learner.texts(range(7)).embeddings[0], expected)
    torch.testing.assert_close(learner.prompts[0].of_names(["car"]), expected[4:5])
    torch.testing.assert_close(
        learner.image_embeddings(pixels()), changed.image_embeddings(pixels()), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(expected, tiny_backbone.class_embeddings(NAMES, ["a photo of a {}."]))


def test_lora_of_clip_lora_has_rank_2_and_the_scale_of_its_code(tiny_backbone: Backbone) -> None:
    products = make(tiny_backbone, "text-lora").prompts[0].products
    for update, up, down in zip(products().values(), products.up, products.down, strict=True):
        stacked = [2**-0.5 * u @ d for u, d in zip(up, down, strict=True)]
        assert [u.shape[1] for u in up] == [2, 2, 2]
        torch.testing.assert_close(update, torch.cat(stacked))


@torch.no_grad()
def test_a_distilled_student_starts_as_its_own_prompt(tiny_backbone: Backbone) -> None:
    teacher = normalize(torch.randn(7, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    config = train_config(data="", model="", method="promptkd", distillation_teacher="some model")
    zero_shot = tiny_backbone.class_embeddings(NAMES, ["a photo of a {}."])
    learner = make_learner(tiny_backbone, config, SPLIT, zero_shot, None, teacher)
    torch.testing.assert_close(learner.texts(range(7)).embeddings[0], zero_shot, rtol=0, atol=1e-4)
    (prompt,) = learner.prompts
    prompt.projector += 0.1
    expected = normalize(teacher[[5, 2]] @ prompt.projector, dim=-1)
    torch.testing.assert_close(learner.texts([5, 2]).embeddings[0], expected)
    with pytest.raises(ConfigError, match="knows the classes of its data set alone"):
        learner.texts_of(["bus"], zero_shot[:1])
    empty = make_learner(tiny_backbone, config, SPLIT, zero_shot)
    empty.load_state_dict(learner.state_dict())
    torch.testing.assert_close(empty.texts([5, 2]).embeddings[0], expected)
