"""Context vectors in deeper blocks of the text tower, against the tower run block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from capt_deploy.core.errors import ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.method.prompt import PromptLearner
from capt_train.setting_groups import PromptSettings

NAMES = ("cat", "large dog", "boat")


@pytest.fixture(scope="module")
def deep(write_model: Callable[..., Path]) -> Backbone:
    """Return a CLIP with four text blocks."""
    text = {"layers": 4}
    folder = write_model(text_cfg=text)
    return load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(backbone: Backbone, tokens: Tensor, context: Tensor, deeper: Tensor) -> Tensor:
    """Run one text after another through CLIP's own text tower, block by block."""
    model, rows = backbone.model, []
    for text in tokens:
        length = int((text == 49407).nonzero()[0]) + 1
        x = model.token_embedding(text[:length])
        x = torch.cat([x[:1], context, x[1 + len(context) :]]) + model.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf")).triu(1).to(x)
        for number, block in enumerate(model.transformer.resblocks):
            if 0 < number <= len(deeper):
                own = deeper[number - 1]
                x = torch.cat([x[:1], own, x[1 + len(own) :]])
            normed = block.ln_1(x)[None]
            x = x + block.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0][0]
            x = x + block.mlp(block.ln_2(x))
        rows.append(model.ln_final(x)[-1] @ model.text_projection)
    return normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_each_block_gets_vectors_of_its_own(deep: Backbone, blocks: int) -> None:
    tokens = deep.tokenize([f"a a {name}." for name in NAMES])
    context, deeper = random(2, 32), random(blocks, 2, 32, seed=1)
    with torch.no_grad():
        found = deep.text.encode(tokens, context, deeper)
        torch.testing.assert_close(found, by_hand(deep, tokens, context, deeper))
        assert not torch.allclose(found, deep.text.encode(tokens, context, deeper[:-1]), atol=1e-3)
        if blocks > 1:
            other = deep.text.encode(tokens, context, deeper.flip(0))
            assert not torch.allclose(found, other, atol=1e-3)


def test_the_order_of_the_axes_is_the_towers(deep: Backbone) -> None:
    turned = copy.deepcopy(deep)  # as open_clip built it before: tokens, batch, width
    turned.model.transformer.batch_first = False
    for block in turned.model.transformer.resblocks:
        block.attn.batch_first = False
    tokens = deep.tokenize([f"a a {name}." for name in NAMES])
    context, deeper = random(2, 32), random(3, 2, 32, seed=1)
    torch.testing.assert_close(
        turned.text.encode(tokens, context, deeper), deep.text.encode(tokens, context, deeper)
    )


def test_the_tower_is_as_before_afterwards_also_after_an_error(deep: Backbone) -> None:
    state = {name: value.clone() for name, value in deep.model.state_dict().items()}
    plain = deep.text_embeddings(["a dog."])
    tokens = deep.tokenize(["a a dog."])
    deeper = random(3, 2, 32).requires_grad_()
    deep.text.encode(tokens, random(2, 32), deeper).sum().backward()
    with pytest.raises(RuntimeError):
        deep.text.encode(tokens, None, random(3, 40, 32))  # more vectors than places
    assert torch.equal(deep.text_embeddings(["a dog."]), plain)
    assert all(torch.equal(state[name], own) for name, own in deep.model.state_dict().items())
    assert all(parameter.grad is None for parameter in deep.model.parameters())


def test_more_blocks_than_there_are_is_an_error_that_says_how_many(deep: Backbone) -> None:
    tokens = deep.tokenize(["a a dog."])
    with pytest.raises(ModelError, match=r"prompt.depth: expected at most 4, .* came 5"):
        deep.text.encode(tokens, random(2, 32), random(4, 2, 32))


def test_gradients_are_right(deep: Backbone) -> None:
    wide = copy.deepcopy(deep)
    wide.model.double()
    tokens = wide.tokenize(["a a dog.", "a a large boat."])
    inputs = [random(2, 32).double(), random(3, 2, 32, seed=1).double()]
    along = random(2, 32, seed=2).double()

    def call(context: Tensor, deeper: Tensor) -> Tensor:
        return (wide.text.encode(tokens, context, deeper) * along).sum()

    values = tuple(value.requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_a_prompt_of_depth_1_has_no_vectors_of_its_own(deep: Backbone) -> None:
    flat = PromptLearner(deep, NAMES, (0, 1), PromptSettings(depth=1))
    assert flat.deeper is None
    assert [name for name, _ in flat.named_parameters()] == ["context"]
    words = deep.text_embeddings([f"a photo of a {name}." for name in NAMES])
    assert torch.equal(flat(range(3)), words)


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_deep_prompt_shares_its_deeper_vectors_among_all_classes(
    deep: Backbone, class_specific: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = PromptSettings(depth=3, class_specific=class_specific)
    prompt = PromptLearner(deep, NAMES, (0, 2), settings, generator)
    assert prompt.deeper is not None
    assert prompt.deeper.shape == (2, 4, 32)
    assert 0.01 < prompt.deeper.std() < 0.03
    prompt.context.data += 0.3 * random(*prompt.context.shape)
    contexts = [prompt.context] * 3
    if class_specific:
        contexts = [prompt.context[0], prompt.context.mean(dim=0), prompt.context[1]]
    found = prompt(range(3))
    for row, name in enumerate(NAMES):
        tokens = deep.tokenize([f"a a a a {name}."])
        expected = by_hand(deep, tokens, contexts[row], prompt.deeper)
        torch.testing.assert_close(found[row : row + 1], expected)
    torch.testing.assert_close(prompt.of_names([NAMES[1]]), found[1:2])
    found.sum().backward()
    assert prompt.deeper.grad is not None
    assert (prompt.deeper.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_a_long_name_beside_a_short_one_gets_the_same_vectors(deep: Backbone) -> None:
    prompt = PromptLearner(deep, NAMES, (0, 1), PromptSettings(depth=4))
    together = prompt(range(3))
    for row in range(3):
        torch.testing.assert_close(prompt([row])[0], together[row])
