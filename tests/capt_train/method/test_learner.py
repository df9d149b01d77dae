"""The text side of a learner: what it says at the start, by index and by name, and what it owns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, left_out, make_learner
from tests.configs import train_config

NAMES = ("cat", "dog", "boat", "tree", "car")
SPLIT = FewShotSplit(NAMES, (0, 1, 2), (), (), {})
TEXT = ("prompt", "text-prompts", "semantic-experts")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")


def zero_shot(backbone: Backbone) -> Tensor:
    return backbone.class_embeddings(NAMES, TEMPLATES)


def make(
    backbone: Backbone, *parts: str, centres: Tensor | None = None, **settings: Any
) -> Learner:
    settings = {"prompt_depth": 2, "visual_prompt_depth": 2, **settings}
    config = train_config(data="", model="", method="zeroshot", added=parts, **settings)
    return make_learner(backbone, config, SPLIT, zero_shot(backbone), centres)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def shaken(learner: Learner) -> Learner:
    """Move every parameter, as a few steps would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in learner.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner


def test_without_any_part_it_says_what_the_hand_written_prompt_says(
    tiny_backbone: Backbone,
) -> None:
    learner = make(tiny_backbone)
    assert not learner.trainable
    assert learner.learned == 1
    texts = learner.texts([3, 1])
    assert torch.equal(texts.embeddings, zero_shot(tiny_backbone)[[3, 1]][None])
    assert texts.gates == ()
    other = unit(2, 32)
    assert torch.equal(learner.texts_of(["bus", "sun"], other).embeddings, other[None])
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(learner.image_embeddings(pixels), tiny_backbone.image_embeddings(pixels))


@pytest.mark.parametrize("parts", [("prompt",), ("prompt", "semantic-experts")])
def test_a_new_prompt_says_what_its_words_say(
    parts: tuple[str, ...], tiny_backbone: Backbone
) -> None:
    learner = make(tiny_backbone, *parts, prompt_words="one small", centres=unit(2, 5, 5, 32))
    words = tiny_backbone.text_embeddings([f"one small {name}." for name in NAMES])
    texts = learner.texts(range(5))
    assert torch.equal(texts.embeddings, words[None])
    assert len(texts.gates) == len(parts) - 1


def test_semantic_experts_work_on_hand_written_prompts_too(tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, "semantic-experts", centres=unit(2, 5, 5, 32))
    assert torch.equal(learner.texts([4, 0]).embeddings[0], zero_shot(tiny_backbone)[[4, 0]])
    shaken(learner)
    with torch.no_grad():
        rows = zero_shot(tiny_backbone)[[4, 0]]
        expected, gates = learner.transforms["semantic-experts"](rows, [4, 0])
        found = learner.texts([4, 0])
    assert torch.equal(found.embeddings, expected[None])
    assert torch.equal(found.gates[0], gates)
    assert len(found.gates) == 1
    changed = (expected - rows).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [False, True]  # 4 was not tuned on and has no sentences


def test_of_several_prompts_the_first_starts_at_the_words_and_no_two_alike(
    tiny_backbone: Backbone,
) -> None:
    learner = make(tiny_backbone, "prompt", prompt_count=3)
    texts = learner.texts(range(5)).embeddings
    assert texts.shape == (3, 5, 32)
    assert learner.learned == 3
    words = tiny_backbone.text_embeddings([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(texts[0], words)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(texts[one], texts[other])
    assert ((texts[1:] * words).sum(dim=-1) > 0.5).all()  # only a little off


def test_several_prompts_go_through_the_same_experts_one_by_one(tiny_backbone: Backbone) -> None:
    parts = ("prompt", "semantic-experts")
    learner = shaken(make(tiny_backbone, *parts, prompt_count=2, centres=unit(2, 5, 5, 32)))
    with torch.no_grad():
        texts = learner.texts([0, 3])
        (routed,) = texts.gates
        assert routed.shape == (4, 3)
        for number, prompt in enumerate(learner.prompts):
            rows = prompt([0, 3])
            expected, gates = learner.transforms["semantic-experts"](rows, [0, 3])
            torch.testing.assert_close(texts.embeddings[number], expected)
            torch.testing.assert_close(routed[2 * number : 2 * number + 2], gates)


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_class_by_name_is_the_class_by_index(
    class_specific: bool, tiny_backbone: Backbone
) -> None:
    settings = {
        "prompt_count": 2,
        "prompt_class_specific": class_specific,
        "centres": unit(2, 5, 5, 32),
    }
    learner = shaken(make(tiny_backbone, *TEXT, **settings))
    rows = [3, 4]  # tuned ones have sentences, and may have contexts, of their own
    names = [NAMES[row] for row in rows]
    by_name = learner.texts_of(names, unit(len(rows), 32)).embeddings
    assert not by_name.requires_grad
    torch.testing.assert_close(by_name, learner.texts(rows).embeddings.detach())
    tuned = learner.texts([0]).embeddings.detach()
    assert not torch.allclose(learner.texts_of(["cat"], unit(1, 32)).embeddings, tuned)


def test_what_it_owns_is_trained_and_nothing_of_the_backbone(tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, *TEXT, "visual", prompt_count=2)
    assert all(parameter.requires_grad for parameter in learner.parameters())
    text, visual = learner.text_parameters, learner.visual_parameters
    ids = [id(parameter) for parameter in (*text, *visual)]
    assert len({*ids}) == len(ids)
    assert {*ids} == {id(parameter) for parameter in learner.parameters()}
    frozen = {id(p) for p in tiny_backbone.model.parameters()}
    assert not frozen & {*ids}
    assert {name.split(".")[0] for name in learner.state_dict()} == {
        "prompts",
        "transforms",
        "tuner",
    }


@pytest.mark.parametrize(
    ("part", "text", "visual"),
    [
        ("prompt", 1, 0),
        ("text-prompts", 0, 0),  # nothing without the prompt
        ("semantic-experts", 5, 0),
        ("adapter", 0, 4),
        ("sample-experts", 0, 6),
        ("visual-prompts", 0, 1),
        ("coa", 0, 0),
    ],
)
def test_each_part_alone(part: str, text: int, visual: int, tiny_backbone: Backbone) -> None:
    learner = make(tiny_backbone, part)
    assert len(learner.text_parameters) == text
    assert len(learner.visual_parameters) == visual
    assert (learner.visual is not None) == bool(visual)
    assert learner.trainable == bool(text + visual)


def test_it_is_made_the_same_from_the_same_seed(tiny_backbone: Backbone) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        own = make(
            tiny_backbone, *TEXT, "visual", prompt_count=2, prompt_random_tokens=3, seed=seed
        )
        return {name: value.clone() for name, value in own.state_dict().items()}

    one, again, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    random = [
        *(f"prompts.{number}.{name}" for number in (0, 1) for name in ("context", "deeper")),
        *(f"tuner.parts.sample-experts.{name}_down" for name in ("first", "second")),
        "tuner.parts.visual-prompts.vectors",
    ]
    assert not any(torch.equal(one[name], other[name]) for name in random)


def test_centres_are_taken_or_left_to_be_loaded(tiny_backbone: Backbone) -> None:
    centres = unit(2, 5, 5, 32)
    with_centres = make(tiny_backbone, "semantic-experts", centres=centres)
    without = make(tiny_backbone, "semantic-experts")
    without.load_state_dict(with_centres.state_dict())
    assert torch.equal(without.transforms["semantic-experts"].centres, centres[:, :3])


def test_gradients_reach_all_of_the_text_side_and_leave_the_tower_alone(
    tiny_backbone: Backbone,
) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.model.state_dict().items()}
    learner = shaken(make(tiny_backbone, *TEXT, prompt_count=2, centres=unit(2, 5, 5, 32)))
    optimizer = torch.optim.AdamW(learner.parameters(), 0.01)
    (learner.texts(range(5)).embeddings * unit(5, 32, seed=2)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in learner.parameters())
    optimizer.step()
    after = tiny_backbone.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in tiny_backbone.model.parameters())


VISUAL = ("adapter", "sample-experts")
MAP = ColourMap(torch.diag(torch.tensor([2.0, 0.5, 1.0])), torch.tensor([0.1, 0.0, -0.3]))


@pytest.mark.parametrize("colours", [None, MAP])
@pytest.mark.parametrize("parts", [(), VISUAL, (*VISUAL, "visual-prompts"), ("visual-prompts",)])
def test_it_starts_at_the_bits_of_its_backbone(
    parts: tuple[str, ...], colours: ColourMap | None, tiny_backbone: Backbone
) -> None:
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    backbone = tiny_backbone.recoloured(colours)
    learner = make(backbone, *parts)
    found, tokens = learner.start(pixels)
    assert torch.equal(found, backbone.image_embeddings(pixels))
    assert (tokens is None) == (not parts)
    if tokens is not None:
        assert torch.equal(tokens, learner.prefix(pixels))


def test_a_colour_map_is_fitted_and_not_trained(tiny_backbone: Backbone) -> None:
    config = train_config(data="", model="", method="zeroshot", added=("colours", "prompt"))
    for colours, parts in ((None, set()), (MAP, {"colours"})):
        learner = make(tiny_backbone.recoloured(colours))
        assert not learner.trainable
        assert learner.recoloured == (colours is not None)
        assert learner.size == (0 if colours is None else 12)
        assert learner.parts(config) == parts
    alone = train_config(data="", model="", method="zeroshot", added=("colours",))
    assert left_out(tiny_backbone, alone) == []


def test_a_tower_without_tokens_says_which_parts_it_leaves_out(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(data="", model="", method="full", prompt_depth=2)
    assert left_out(tiny_backbone, config) == []
    monkeypatch.setattr(tiny_backbone, "tower", None)
    (notice,) = left_out(tiny_backbone, config)
    assert notice.endswith("left out: adapter, sample-experts, visual-prompts, lora, layer-norm")
    assert left_out(tiny_backbone, train_config(data="", model="", method="prompt")) == []
    learner = make(tiny_backbone, "prompt", "visual")
    assert learner.visual is None
    assert learner.text_parameters
