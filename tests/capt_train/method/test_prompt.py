from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capt_deploy.core.errors import ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.method.prompt import PromptLearner
from capt_train.setting_groups import PromptSettings

NAMES = ("cat", "big brown dog", "x", "electric guitar")


def learner(backbone: Backbone, seed: int = 0, **settings: Any) -> PromptLearner:
    generator = torch.Generator().manual_seed(seed)
    return PromptLearner(backbone, NAMES, (0, 1, 2), PromptSettings(depth=1, **settings), generator)


def step(prompt: PromptLearner, *classes: int) -> Tensor:
    """Take a step that pushes the first of `classes` away from the others."""
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    embeddings = prompt(classes)
    (embeddings[0] @ embeddings[1:].T).sum().backward()
    optimizer.step()
    gradient = prompt.context.grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("words", ["a photo of a", "this is", "microscope slide:"])
def test_before_the_first_step_it_equals_the_hand_written_prompt(
    tiny_backbone: Backbone, words: str, class_specific: bool
) -> None:
    prompt = learner(tiny_backbone, words=words, class_specific=class_specific)
    expected = tiny_backbone.class_embeddings(NAMES, [f"{words} {{}}."])
    torch.testing.assert_close(prompt(range(4)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "text_cfg", [{}, {"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}]
)
def test_the_same_holds_for_towers_of_another_build(
    write_model: Callable[..., Path], text_cfg: dict[str, Any]
) -> None:
    folder = write_model(custom_text=True, text_cfg=text_cfg)
    backbone = load_backbone(str(folder), None, torch.device("cpu"))
    prompt = learner(backbone)
    expected = backbone.class_embeddings(NAMES, ["a photo of a {}."])
    torch.testing.assert_close(prompt(range(4)), expected, rtol=0, atol=1e-6)
    assert (step(prompt, 0, 1, 2).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("class_specific", [False, True])
def test_classes_can_be_asked_for_in_any_order(
    tiny_backbone: Backbone, class_specific: bool
) -> None:
    prompt = learner(tiny_backbone, class_specific=class_specific)
    with torch.no_grad():
        prompt.context += 0.1 * torch.randn(prompt.context.shape)
        torch.testing.assert_close(prompt([3, 0, 2]), prompt(range(4))[[3, 0, 2]])


def test_a_step_moves_the_context_and_nothing_else(tiny_backbone: Backbone) -> None:
    frozen = {name: value.clone() for name, value in tiny_backbone.model.state_dict().items()}
    prompt = learner(tiny_backbone)
    start = prompt.context.detach().clone()
    before = prompt(range(4)).detach()
    step(prompt, 0, 1, 2)
    assert not torch.equal(prompt.context, start)
    assert (prompt(range(4)) - before).abs().amax(dim=1).min() > 1e-4  # every class
    assert all(torch.equal(tiny_backbone.model.state_dict()[k], v) for k, v in frozen.items())
    assert all(own.grad is None for own in tiny_backbone.model.parameters())


def test_only_the_context_is_a_parameter(tiny_backbone: Backbone) -> None:
    assert [name for name, _ in learner(tiny_backbone).named_parameters()] == ["context"]
    assert list(learner(tiny_backbone).state_dict()) == ["context"]


def test_gradients_reach_every_vector_of_a_shared_context(tiny_backbone: Backbone) -> None:
    gradient = step(learner(tiny_backbone), 0, 1, 2)
    assert gradient.shape == (4, 32)
    assert (gradient.abs().amax(dim=1) > 0).all()


def test_gradients_reach_only_the_contexts_of_the_classes_asked_for(
    tiny_backbone: Backbone,
) -> None:
    gradient = step(learner(tiny_backbone, class_specific=True), 0, 2)
    assert gradient.shape == (3, 4, 32)
    assert (gradient[[0, 2]].abs().amax(dim=(1, 2)) > 0).all()
    assert (gradient[1] == 0).all()


def test_the_gradient_is_that_of_finite_differences(tiny_backbone: Backbone) -> None:
    prompt = learner(tiny_backbone)
    direction = torch.randn(prompt.context.shape, generator=torch.Generator().manual_seed(0))
    target = tiny_backbone.text_embeddings(["a bowl of soup"])

    def value(shift: float) -> Tensor:
        with torch.no_grad():
            prompt.context += shift * direction
            result: Tensor = (prompt(range(4)) @ target.T).sum()
            prompt.context -= shift * direction
        return result

    (prompt(range(4)) @ target.T).sum().backward()
    assert prompt.context.grad is not None
    expected = (value(1e-3) - value(-1e-3)) / 2e-3
    torch.testing.assert_close((prompt.context.grad * direction).sum(), expected, rtol=1e-2, atol=0)


def test_a_random_start_is_decided_by_the_seed(tiny_backbone: Backbone) -> None:
    first, again, other = (learner(tiny_backbone, seed, random_tokens=6) for seed in (1, 1, 2))
    assert first.context.shape == (6, 32)
    assert torch.equal(first.context, again.context)
    assert not torch.equal(first.context, other.context)


def test_a_class_that_is_not_tuned_takes_the_mean_context(tiny_backbone: Backbone) -> None:
    specific = learner(tiny_backbone, class_specific=True)
    shared = learner(tiny_backbone)
    with torch.no_grad():
        specific.context += 0.1 * torch.randn(specific.context.shape)
        shared.context.copy_(specific.context.mean(dim=0))
    torch.testing.assert_close(specific([3]), shared([3]))
    assert (specific([0]) - shared([0])).abs().max() > 1e-4


def test_a_context_that_leaves_no_place_for_the_name_is_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(ModelError, match="too long for the model's 16 tokens"):
        learner(tiny_backbone, random_tokens=14)
