"""Rows of open_clip's own tokenizer, of one like SigLIP's, and of other Hugging Face layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.random_models import write_tokenizer
from capt_deploy.core.errors import ModelError
from capt_train.clip.text_tokens import TextTokens

LENGTH = 12
# Of a table of whole words; what stands around them is the layout.
TABLE = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "red": 5, "ball": 6, "en": 7}
Make = Callable[..., TextTokens]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that loads a Hugging Face tokenizer by open_clip from a `local-dir`."""

    def make(
        layout: str | None = "<s> $A </s>", text_cfg: Mapping[str, Any] | None = None, **own: Any
    ) -> TextTokens:
        tokenizer = Tokenizer(models.WordLevel(TABLE, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if layout is not None:
            special = [(name, TABLE[name]) for name in layout.split() if name in TABLE]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=layout, special_tokens=special
            )
        own = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **own}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own).save_pretrained(tmp_path)
        return TextTokens(loaded(tmp_path, **(text_cfg or {})))

    return make


def loaded(folder: Path, **text_cfg: Any) -> Any:
    own = {"context_length": LENGTH, "hf_tokenizer_name": "own", **text_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": own}}))
    return open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.fixture
def siglip(tmp_path: Path) -> TextTokens:
    write_tokenizer(tmp_path)
    return TextTokens(loaded(tmp_path, tokenizer_kwargs={"clean": "canonicalize"}))


@pytest.fixture
def clip() -> TextTokens:
    return TextTokens(open_clip.get_tokenizer("ViT-B-32", context_length=LENGTH))


def layout(tokens: TextTokens) -> tuple[tuple[int, ...], int, int]:
    return tokens.start, tokens.end, tokens.pad


def test_clips_own_rows_begin_with_a_start_and_end_in_zeros(clip: TextTokens) -> None:
    assert layout(clip) == ((49406,), 49407, 0)
    row = clip.whole(["a red ball."])[0].tolist()
    assert row == clip.tokenizer(["a red ball."])[0].tolist()
    assert clip.words("a red ball.").tolist() == row[1:5]
    assert clip.words("").tolist() == []


def test_siglips_rows_begin_with_words_and_are_padded_with_their_end(siglip: TextTokens) -> None:
    assert layout(siglip) == ((), 1, 1)
    row = siglip.whole(["a red ball."])[0].tolist()
    assert row == siglip.tokenizer(["a red ball."])[0].tolist()
    assert row[3:] == [1] * (LENGTH - 3)  # its cleaning takes the full stop away
    words = siglip.words("A red, red ball.").tolist()
    assert siglip.tokenizer.tokenizer.decode(words).split() == ["a", "red", "red", "ball"]


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ("$A </s>", {}, ((), 2, 0)),  # T5
        ("<s> $A </s>", {}, ((1,), 2, 0)),  # BERT
        ("<s> $A </s>", {"pad_token": "<s>"}, ((1,), 2, 1)),
        ("en $A </s>", {"pad_token": "</s>"}, ((7,), 2, 2)),  # NLLB: the language first
        ("<s> en $A </s>", {}, ((1, 7), 2, 0)),
        (None, {}, ((), 0, 0)),  # no end at all: padding is as good as one
    ],
)
def test_other_layouts_are_found_out(
    make: Make, shape: str, options: dict[str, str], expected: tuple[tuple[int, ...], int, int]
) -> None:
    tokens = make(shape, **options)
    assert layout(tokens) == expected
    start, end, pad = expected
    assert tokens.words("a red ball").tolist() == [4, 5, 6]
    assert tokens.whole(["red"])[0].tolist() == [*start, 5, end, *[pad] * (LENGTH - 2 - len(start))]
    places = tokens.whole(["red"], 3)[0].tolist()
    assert places == [*start, 4, 4, 4, 5, end, *[pad] * (LENGTH - 5 - len(start))]


def test_a_separator_that_is_stripped_leaves_padding_as_the_end(make: Make) -> None:
    strip = {"tokenizer_kwargs": {"strip_sep_token": True}}
    tokens = make(text_cfg=strip, sep_token="</s>")
    assert layout(tokens) == ((1,), 0, 0)
    assert tokens.whole(["red"])[0].tolist() == [1, 5, *[0] * (LENGTH - 2)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_places_stand_where_the_words_of_a_prompt_do(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokens: TextTokens = request.getfixturevalue(kind)
    names = ["red ball.", "a.", "blue", "x9"]
    words = len(tokens.words("a photo of a"))
    expected = tokens.whole([f"a photo of a {name}" for name in names])
    rows = tokens.whole(names, words)
    assert rows.shape == expected.shape
    first = tokens.leading
    assert torch.equal(rows[:, :first], expected[:, :first])
    assert torch.equal(rows[:, first + words :], expected[:, first + words :])
    held = rows[:, first : first + words].unique().tolist()
    assert held == tokens.words("a").tolist()[:1]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_fits_up_to_the_last_place_and_no_further(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokens: TextTokens = request.getfixturevalue(kind)
    room = LENGTH - tokens.leading - 1
    full = tokens.whole(["a", "cat " * room])
    assert full.shape == (2, LENGTH)
    assert tokens.ends(full).tolist() == [tokens.leading + 1, LENGTH - 1]
    with pytest.raises(ModelError, match=r"for the model's 12 tokens: 'cat .*shorten the class"):
        tokens.whole(["a", "cat " * (room + 1)])
    assert tokens.whole(["cat " * (room - 3)], 3).shape == (1, LENGTH)
    with pytest.raises(ModelError, match=r"12 tokens: 'dog' behind 12 context vectors"):
        tokens.whole(["dog"], LENGTH)
    with pytest.raises(ModelError, match=r"'cat cat .* behind 3 context vectors"):
        tokens.whole(["cat " * (room - 2)], 3)
    cut = tokens.cut(["cat " * 50])
    assert torch.equal(cut, full[1:])


def test_a_text_without_an_end_that_is_too_long_is_noticed(make: Make) -> None:
    tokens = make(None)
    assert tokens.whole(["red " * (LENGTH - 1)]).shape == (1, LENGTH)
    with pytest.raises(ModelError, match="too long"):
        tokens.whole(["red " * 30])
    assert tokens.ends(tokens.cut(["red " * 30])).tolist() == [LENGTH]


@pytest.mark.parametrize(
    ("shape", "options", "text_cfg"),
    [
        ("<s> $A </s>", {"padding_side": "left"}, {}),
        ("$A </s>", {"padding_side": "left", "pad_token": "</s>"}, {}),
        (None, {"padding_side": "left"}, {}),
        (
            "$A </s>",
            {"bos_token": "<s>", "cls_token": "en"},
            {"tokenizer_mode": "clips"},  # a class token stands behind the padding
        ),
    ],
)
def test_a_layout_that_prompts_do_not_fit_into_is_refused_and_shown(
    make: Make, shape: str, options: dict[str, Any], text_cfg: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"HFTokenizer: expected rows of .* 'a' becomes \["):
        make(shape, text_cfg, **options)


def test_a_tokenizer_that_cannot_pad_is_refused(make: Make) -> None:
    with pytest.raises(ModelError, match=r"HFTokenizer: expected rows of one length, came .*pad"):
        make(pad_token=None)


def test_words_that_run_together_are_refused_where_places_are_asked_for(tmp_path: Path) -> None:
    whole = Tokenizer(
        models.Unigram(
            [
                ("</s>", 0.0),
                ("<unk>", 0.0),
                ("a", -1.0),
                (" ", -1.0),
                ("a r", -1.0),
                ("red", -1.0),
                ("ed", -1.0),
            ],
            1,
        )
    )
    whole.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    own = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=whole, **own).save_pretrained(tmp_path)
    tokens = TextTokens(loaded(tmp_path))
    assert tokens.words("red").tolist() == [5]
    with pytest.raises(ModelError, match="same tokens of a word whatever follows it"):
        tokens.whole(["red"], 2)


def test_only_a_vocabulary_that_came_with_the_model_is_signed(
    clip: TextTokens, siglip: TextTokens, tmp_path: Path
) -> None:
    assert clip.signature() == b""
    table = json.loads(siglip.signature())
    assert dict(table) == siglip.tokenizer.tokenizer.get_vocab()
