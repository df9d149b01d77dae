"""Against open_clip's own tokenizer, for which each must be one token, and tables by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import open_clip
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capt_deploy.core.errors import ModelError
from capt_train.clip.text_tokens import whole_words


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


def test_every_word_is_one_token_that_reads_back(tokenizer: Any) -> None:
    for word in whole_words(tokenizer)[::50]:
        (token,) = tokenizer.encode(word)
        assert tokenizer.decode([token]) == f"{word} "


def test_clips_vocabulary_has_thousands_of_words_sorted_and_once_each(tokenizer: Any) -> None:
    words = whole_words(tokenizer)
    assert len(words) > 20_000
    assert words == sorted(set(words))
    assert {"otter", "beaver", "photo", "the", "cat"} <= set(words)


def test_only_closed_lower_case_entries_of_three_letters_are_words() -> None:
    entries = [
        "otter</w>",
        "ant</w>",
        "bee</w>",
        "ox</w>",
        "a</w>",
        "beav",
        "Otter</w>",
        "elk3</w>",
    ]
    entries += [
        "won't</w>",
        "fÃ©e</w>",
        "<end_of_text>",
        "</w>",
        "...</w>",
        "emu</w></w>",
        " bat</w>",
    ]
    table = {entry: number for number, entry in enumerate(entries)}
    assert whole_words(SimpleNamespace(encoder=table)) == ["ant", "bee", "otter"]


class Foreign:
    """A tokenizer without a table."""


class Inside:
    """One that marks what goes on inside words, not where they begin or end."""

    encoder: ClassVar[dict[str, int]] = {"otter": 0, "##er": 1}


@pytest.mark.parametrize("kind", [Foreign, Inside])
def test_a_vocabulary_that_cannot_be_listed_is_named(kind: type) -> None:
    with pytest.raises(ModelError, match=f"tokenizer {kind.__name__}: .*cannot be listed"):
        whole_words(kind())


def unigram(units: list[tuple[str, float]]) -> Any:
    """Return a SentencePiece-like tokenizer of units with log-probabilities, as open_clip does."""
    own = Tokenizer(models.Unigram([("<unk>", 0.0), *units], 0))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=own))


def test_of_units_those_are_words_that_begin_one_and_are_chosen() -> None:
    words = [("▁otter", -2.0), ("▁bee", -2.0), ("▁Elk", -2.0), ("▁ox", -1.0), ("beaver", -2.0)]
    pieces = [("▁", -1.0), ("ant", -1.0), ("▁fer", -2.0), ("ret", -2.0)]
    tokenizer = unigram([*words, *pieces, ("▁ferret", -3.9), ("▁ant", -2.1)])
    assert whole_words(tokenizer) == ["bee", "fer", "ferret", "otter"]  # ▁ and ant are likelier
    assert tokenizer.tokenizer.tokenize("ant ferret") == ["▁", "ant", "▁ferret"]
