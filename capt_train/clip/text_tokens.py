"""Texts as token ids, by the tokenizer of any model, and the words in its vocabulary."""

import json
import re
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from capt_deploy.core.errors import ModelError

_PROBED = 16  # tokens
# Byte-pair entries end in `</w>` at the end of a word, SentencePiece's begin with ▁ at its start.
# Shorter entries are mostly parts of words.
_WHOLE_WORD = re.compile("([a-z]{3,})</w>|▁([a-z]{3,})")


class TextTokens:
    """A tokenizer of open_clip's, its own or a Hugging Face one, and the layout of its rows.

    A row is a start, the words, the end token and padding. CLIP's start is [SOS]; SigLIP's rows
    have none, and their padding is the end token. The layout is found by probing the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Find the layout of the rows.

        Raises:
            ModelError: rows have another layout than described above, so prompts cannot be built.
        """
        self.tokenizer = tokenizer
        self.length = int(tokenizer.context_length)  # of a row: the model's context
        rows = _probe(tokenizer, ["", "a", "a a"])
        empty, single, _ = rows
        differ = [a != b for a, b in zip(empty, single, strict=True)]
        self.leading = differ.index(True) if any(differ) else 0  # tokens in front of the words
        self.start = tuple(empty[: self.leading])
        self.end, self.pad = empty[self.leading], empty[-1]
        no_words, self._word, two_words = (self._between(row) for row in rows)
        separate = not no_words and 0 < len(self._word) < len(two_words)
        if not separate or any(self._rebuilt(row) != row for row in rows):
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__}: expected rows of [start] words [end] and "
                f"padding behind it, but 'a' becomes {single}; take another model"
            )

    def signature(self) -> bytes:
        """Return the vocabulary that came with the model; nothing for open_clip's own."""
        if not hasattr(self.tokenizer, "tokenizer"):
            return b""
        return json.dumps(sorted(vocabulary(self.tokenizer).items())).encode()

    def cut(self, texts: Sequence[str]) -> Int[Tensor, "texts tokens"]:
        """Return rows of token ids; texts that are too long lose their last words."""
        rows: Tensor = self.tokenizer(list(texts))
        return rows

    def whole(self, texts: Sequence[str], places: int = 0) -> Int[Tensor, "texts tokens"]:
        """Return rows of token ids of texts that must fit.

        Args:
            texts: the words behind the places.
            places: tokens in front of each text, to be replaced by vectors.

        Raises:
            ModelError: a text is longer than the model's context, or the tokens of a word depend on
                the words behind it.
        """
        if not places:
            return self._checked(texts, texts, self.length, "")
        # A word at the start of a text may differ from the same word behind others, so "a" stands
        # there while the texts become tokens.
        word = len(self._word)
        prefixed = [f"a {text}" for text in texts]
        room = self.length - places + word
        rows = self._checked(prefixed, texts, room, f" behind {places} context vectors")
        sizes = [self.leading, word, rows.shape[1] - self.leading - word]
        before, prefix, behind = rows.split(sizes, dim=1)
        if (prefix != torch.tensor(self._word)).any():
            raise ModelError(
                f"tokenizer {type(self.tokenizer).__name__}: expected the same tokens of a word "
                f"whatever follows it; tune without a learned prompt (--without prompt)"
            )
        return torch.cat([before, prefix[:, :1].expand(-1, places), behind], dim=1)

    def words(self, text: str) -> Int[Tensor, " tokens"]:
        """Return the token ids of `text` without start, end and padding.

        Raises:
            ModelError: it is longer than the model's context.
        """
        row = self.whole([text])
        return row[0, self.leading : int(self.ends(row)[0])]

    def ends(self, rows: Int[Tensor, "texts tokens"]) -> Int[Tensor, " texts"]:
        """Return the position of each row's end token; the row's length where there is none."""
        is_end = rows[:, self.leading :] == self.end
        places = self.leading + is_end.int().argmax(dim=1)
        return torch.where(is_end.any(dim=1), places, rows.shape[1])

    def _checked(
        self, texts: Sequence[str], shown: Sequence[str], length: int, behind: str
    ) -> Tensor:
        """Return rows of `length` tokens; an error names the `shown` text and what is before it."""
        # Tokenizers cut silently, so one more token is requested: it shows which texts do not fit.
        room = max(length, self.leading + 1) + 1
        rows: Tensor = self.tokenizer(list(texts), context_length=room)
        late = self.ends(rows) >= length
        if late.any():
            raise ModelError(
                f"too long for the model's {self.length} tokens: "
                f"{shown[int(late.nonzero()[0])]!r}{behind}; "
                f"shorten the class name (--class-names) or the prompt"
            )
        return rows[:, :length]

    def _between(self, row: list[int]) -> list[int]:
        """Return the ids between start and end."""
        behind = row[self.leading :]
        return behind[: behind.index(self.end)] if self.end in behind else behind

    def _rebuilt(self, row: list[int]) -> list[int]:
        """Return the row put together from start, its words, end and padding."""
        ids = [*self.start, *self._between(row), self.end]
        return ids + [self.pad] * (len(row) - len(ids))


def whole_words(tokenizer: Any) -> list[str]:
    """Return the lower-case words of three letters or more that are one token each, sorted.

    SentencePiece does not mark the end of a word, so some of its words are only beginnings.

    Raises:
        ModelError: the tokenizer has no vocabulary, or no whole words in it.
    """
    matches = (_WHOLE_WORD.fullmatch(entry) for entry in vocabulary(tokenizer))
    words = sorted({match[1] or match[2] for match in matches if match})
    inner = getattr(tokenizer, "tokenizer", None)
    if words and inner is not None:  # units are chosen by probability, so a longer one may lose
        units = inner(words, add_special_tokens=False).input_ids
        words = [word for word, ids in zip(words, units, strict=True) if len(ids) == 1]
    if not words:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: its words cannot be listed; expected "
            f"a table with entries like 'otter</w>' or '▁otter'; tune with --without mixture"
        )
    return words


def vocabulary(tokenizer: Any) -> Mapping[str, int]:
    """Return the table of a tokenizer, entry to id; empty where it has none.

    Args:
        tokenizer: open_clip's own with its table `encoder`, or one around a Hugging Face tokenizer.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    table = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(tokenizer, "encoder", {})
    return table if isinstance(table, Mapping) else {}


def _probe(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    try:
        rows: list[list[int]] = tokenizer(texts, context_length=_PROBED).tolist()
    except Exception as cause:  # tokenizers raise errors of any type
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: expected rows of one length, came "
            f"{shorten(repr(cause), 200)}; take another model"
        ) from cause
    return rows
