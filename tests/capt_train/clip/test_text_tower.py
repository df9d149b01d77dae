"""What is put in the place of words, in text towers of every build."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig

from capt_deploy.core.errors import ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.method.learner import left_out
from capt_train.method.prompt import PromptLearner
from capt_train.setting_groups import PromptSettings
from tests.configs import train_config
from tests.families import family

CPU = torch.device("cpu")
SIGLIP = family("ViT-B-16-SigLIP")["text_cfg"]
NAMES = ["cat", "small grey dog", "x"]


@pytest.fixture(scope="module")
def siglip(write_model: Callable[..., Path]) -> Backbone:
    """Return a model whose text side is SigLIP's, with four blocks."""
    folder = write_model(custom_text=True, text_cfg={**SIGLIP, "layers": 4})
    return load_backbone(str(folder), None, CPU)


@pytest.fixture(scope="module")
def bert(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose text side is a BERT of the transformers library."""
    own = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=1,
    )
    folder = tmp_path_factory.mktemp("bert")
    own.save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": "own", "hf_proj_type": "linear"}
    return write_model(text_cfg={**text, "hf_pooler_type": "mean_pooler"})


def recorded(backbone: Backbone, texts: list[str]) -> list[int]:
    """Return how many tokens the text tower is given."""
    lengths: list[int] = []

    def record(_: Any, __: Any, vectors: Tensor) -> None:
        lengths.append(vectors.shape[1])

    tower = getattr(backbone.model, "text", backbone.model)
    handle = tower.ln_final.register_forward_hook(record)
    backbone.text_embeddings(texts)
    handle.remove()
    return lengths


def test_the_text_tower_sees_nothing_behind_the_last_end_of_a_text(tiny_backbone: Backbone) -> None:
    # [SOS] a photo of a cat . [EOS], of 16
    assert recorded(tiny_backbone, ["cat", "a photo of a cat."]) == [8]


CAUSAL = {**SIGLIP, "no_causal_mask": False}


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (SIGLIP, 16),  # every place is seen, and the last one is asked
        ({**CAUSAL, "pool_type": "eos", "eos_id": 1}, 6),  # a photo of a cat </s>
        ({**CAUSAL, "pool_type": "eos", "eos_id": 5}, 16),  # another end than the tokenizer's
        ({**CAUSAL, "pool_type": "argmax"}, 6),  # among the words, wherever the highest id is
        ({**CAUSAL, "pool_type": "last"}, 16),
    ],
)
def test_texts_are_cut_only_where_no_embedding_changes(
    write_model: Callable[..., Path], text: Mapping[str, Any], length: int
) -> None:
    folder = write_model(custom_text=True, text_cfg=text)
    backbone = load_backbone(str(folder), None, CPU)
    texts = ["cat", "a photo of a cat."]
    assert recorded(backbone, texts) == [length]
    name = f"local-dir:{folder}"
    with torch.no_grad():
        expected = (
            open_clip.create_model(name)
            .eval()
            .encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
        )
    torch.testing.assert_close(backbone.text_embeddings(texts), expected, rtol=0, atol=2e-6)


def test_a_context_in_place_of_its_own_words_changes_nothing(tiny_backbone: Backbone) -> None:
    words = tiny_backbone.text.vectors(tiny_backbone.tokens.words("a photo of a"))
    tokens = tiny_backbone.tokenize(["x x x x cat.", "x x x x big dog."])
    expected = tiny_backbone.text_embeddings(["a photo of a cat.", "a photo of a big dog."])
    torch.testing.assert_close(tiny_backbone.text.encode(tokens, words), expected)
    per_text = words.expand(2, -1, -1)
    torch.testing.assert_close(tiny_backbone.text.encode(tokens, per_text), expected)


def test_without_a_start_token_the_context_stands_first(siglip: Backbone) -> None:
    words = siglip.text.vectors(siglip.tokens.words("a photo of a"))
    tokens = siglip.tokenize([f"{name}." for name in NAMES], 4)
    expected = siglip.text_embeddings([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(siglip.text.encode(tokens, words), expected, rtol=0, atol=1e-6)
    for place in range(4):  # the first one too is the context's
        moved = words.clone()
        moved[place] = moved[place].flip(0)
        assert not torch.allclose(siglip.text.encode(tokens, moved), expected, atol=1e-3)


def test_deeper_vectors_of_siglip_stand_at_the_same_places(siglip: Backbone) -> None:
    draw = torch.Generator().manual_seed(0)
    context, *deeper = (0.5 * torch.randn(2, 32, generator=draw) for _ in range(3))
    tokens, text = siglip.tokenize([f"{name}." for name in NAMES], 2), siglip.model.text
    with torch.no_grad():
        x = text.token_embedding(tokens)
        x = torch.cat([context.expand(3, -1, -1), x[:, 2:]], dim=1) + text.positional_embedding
        for block, own in zip(text.transformer.resblocks, [None, *deeper, None], strict=True):
            if own is not None:
                x = torch.cat([own.expand(3, -1, -1), x[:, 2:]], dim=1)
            x = block(x)
        expected = normalize(text.text_projection(text.ln_final(x)[:, -1]), dim=-1)
    found = siglip.text.encode(tokens, context, torch.stack(deeper))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_hugging_face_tower_takes_a_prompt_but_no_deeper_one(bert: Path) -> None:
    backbone = load_backbone(str(bert), None, CPU)
    name = f"local-dir:{bert}"
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(name)([f"a photo of a {own}." for own in NAMES])
        expected = open_clip.create_model(name).eval().encode_text(tokens, normalize=True)
    prompt = PromptLearner(backbone, NAMES, (0, 1), PromptSettings(depth=1))
    torch.testing.assert_close(prompt(range(3)), expected, rtol=0, atol=1e-6)
    (prompt(range(3)) @ expected[0].flip(0)).sum().backward()
    assert prompt.context.grad is not None
    assert (prompt.context.grad.abs().amax(dim=1) > 0).all()
    deeper = PromptLearner(backbone, NAMES, (0, 1), PromptSettings(depth=2))
    torch.testing.assert_close(deeper(range(3)), prompt(range(3)), rtol=0, atol=0)
    config = train_config(data="", model="", prompt_depth=2, added=("text-prompts",))
    (notice,) = left_out(backbone, config)
    assert notice.startswith("1 block of the text tower can be reached; contexts go no deeper")


class Aside(nn.Module):
    """A text tower that has a table, but looks its tokens up elsewhere."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original
        self.token_embedding = nn.Embedding(8, 4)
        self.pool_type, self.attn_mask = "last", None

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.original(tokens)
        return embeddings


@pytest.mark.parametrize("table", [True, False])
def test_a_tower_that_takes_no_vectors_is_refused_before_anything_is_tuned(
    write_model: Callable[..., Path], table: bool
) -> None:
    backbone = load_backbone(str(write_model(custom_text=True)), None, CPU)
    backbone.model.text = Aside(backbone.model.text)
    if not table:
        del backbone.model.text.token_embedding
    other = Backbone(backbone.model, backbone.tokens.tokenizer, backbone.preprocess)
    assert torch.equal(other.text_embeddings(NAMES), other.text_embeddings(NAMES))
    with pytest.raises(ModelError, match=r"text tower Aside: no vectors .*--without prompt"):
        PromptLearner(other, NAMES, (0, 1), PromptSettings(depth=1))


@pytest.mark.parametrize("kind", ["tiny_backbone", "siglip"])
def test_the_hook_of_a_context_is_gone_afterwards_even_after_an_error(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backbone: Backbone = request.getfixturevalue(kind)
    before = backbone.text_embeddings(["a cat."])
    tokens = backbone.tokenize(["x x cat."])
    with pytest.raises(RuntimeError):
        backbone.text.encode(tokens, torch.zeros(2, 5))  # of another width
    assert torch.equal(backbone.text_embeddings(["a cat."]), before)


def test_another_vocabulary_is_another_model(siglip: Backbone, tmp_path: Path) -> None:
    folder = Path(siglip.tokens.tokenizer.tokenizer.name_or_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_backbone(str(tmp_path), None, CPU).fingerprint() == siglip.fingerprint()
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    units = table["model"]["vocab"]
    units[-1], units[-2] = units[-2], units[-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert load_backbone(str(tmp_path), None, CPU).fingerprint() != siglip.fingerprint()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how many tokens are encoded at once."""
    return lambda tokens: monkeypatch.setattr("capt_train.clip.text_tower._AT_ONCE", tokens)


def encoded(
    backbone: Backbone, count: int, *, each: bool = False, saved: list[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return embeddings of texts, and the gradients of all that can be learned in the tower.

    With `each`, every text has a context of its own. `saved` gets the numbers of elements that are
    kept for the way back.
    """
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape, generator=draw)).requires_grad_()

    texts = [f"{('cat', 'small grey dog')[number % 2]}." for number in range(count)]
    tokens = backbone.tokenize(texts, 3)
    name, width = next(iter(backbone.text.attention_weights())), 32
    leaves = [leaf(*([count] if each else []), 3, width), leaf(1, 3, width)]
    leaves.append(leaf(*backbone.text.weight(name).shape))

    def pack(tensor: Tensor) -> Tensor:
        if saved is not None:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = backbone.text.encode(tokens, leaves[0], leaves[1], {name: leaves[2]})
    goal = torch.randn(embeddings.shape, generator=draw)
    (embeddings * goal).sum().backward()
    return embeddings.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 60])
def test_many_texts_in_parts_have_the_same_embeddings_and_gradients(
    tiny_backbone: Backbone, in_parts: Callable[[int], None], each: bool, tokens: int
) -> None:
    embeddings, gradients = encoded(tiny_backbone, 12, each=each)
    assert len(gradients) == 3 and all(gradient.any() for gradient in gradients)
    in_parts(tokens)
    parts, by_parts = encoded(tiny_backbone, 12, each=each)
    torch.testing.assert_close(parts, embeddings, rtol=0, atol=1e-6)
    for whole, own in zip(gradients, by_parts, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-6)


def test_however_many_texts_only_one_part_is_kept_for_the_way_back(
    tiny_backbone: Backbone, in_parts: Callable[[int], None]
) -> None:
    def kept(count: int) -> int:
        saved = list[int]()
        encoded(tiny_backbone, count, saved=saved)
        return sum(saved)

    whole = kept(24) - kept(12)
    in_parts(40)
    assert 0 <= kept(24) - kept(12) < whole / 100


def test_texts_that_fit_are_computed_at_once(
    tiny_backbone: Backbone, in_parts: Callable[[int], None]
) -> None:
    assert len(recorded(tiny_backbone, ["cat"] * 4)) == 1
    in_parts(8)  # [SOS] cat [EOS], twice
    assert recorded(tiny_backbone, ["cat"] * 4) == [3, 3]
