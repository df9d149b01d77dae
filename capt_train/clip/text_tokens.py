"""Texts as token ids, by whatever tokenizer a model brings."""

import json
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from capt_deploy.core.errors import ModelError
from capt_train.clip.vocabulary import vocabulary

_PROBED = 16  # tokens


class TextTokens:
    """A tokenizer of open_clip's, its own or a Hugging Face one, and how its rows are laid out.

    A row is what stands in front of the words, the words, the end, padding. What that is differs:
    CLIP's begins with [SOS]; SigLIP's with the first word, and it pads with its end token. It is
    found by asking the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Find out how rows are laid out.

        Raises:
            ModelError: not as described above, so prompts cannot be put together.
        """
        self.tokenizer = tokenizer
        self.length = int(tokenizer.context_length)  # of a row: the model's context
        rows = _probe(tokenizer, ["", "a", "a a"])
        empty, one, _ = rows
        differ = [a != b for a, b in zip(empty, one, strict=True)]
        self.leading = differ.index(True) if any(differ) else 0  # tokens in front of the words
        self.start = tuple(empty[: self.leading])
        self.end, self.pad = empty[self.leading], empty[-1]
        nothing, self._word, words = (self._between(row) for row in rows)
        apart = nothing == [] and 0 < len(self._word) < len(words)
        if not apart or any(self._rebuilt(row) != row for row in rows):
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__}: expected rows of [start] words [end] and "
                f"padding behind it, but 'a' becomes {one}; take another model"
            )

    def signature(self) -> bytes:
        """Return the vocabulary where it came with the model; nothing of open_clip's own."""
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
            texts: what stands behind the places.
            places: so many tokens are put in front of each text, to be replaced by vectors.

        Raises:
            ModelError: a text is longer than the model's context, or words do not stay apart.
        """
        if not places:
            return self._fitting(texts, texts, self.length, "")
        # A word at the start of a text may differ from the same word behind others, so one stands
        # there while the texts become tokens.
        word, behind = len(self._word), f" behind {places} context vectors"
        room = self.length - places + word
        rows = self._fitting([f"a {text}" for text in texts], texts, room, behind)
        sizes = [self.leading, word, rows.shape[1] - self.leading - word]
        before, found, others = rows.split(sizes, dim=1)
        if (found != torch.tensor(self._word)).any():
            raise ModelError(
                f"tokenizer {type(self.tokenizer).__name__}: expected the same tokens of a word "
                f"whatever follows it; tune without a learned prompt (--without prompt)"
            )
        return torch.cat([before, found[:, :1].expand(-1, places), others], dim=1)

    def words(self, text: str) -> Int[Tensor, " tokens"]:
        """Return the token ids of `text` without start, end and padding.

        Raises:
            ModelError: it is longer than the model's context.
        """
        row = self.whole([text])
        return row[0, self.leading : int(self.ends(row)[0])]

    def ends(self, rows: Int[Tensor, "texts tokens"]) -> Int[Tensor, " texts"]:
        """Return where the end token of each row stands; behind the row where there is none."""
        found = rows[:, self.leading :] == self.end
        places = self.leading + found.int().argmax(dim=1)
        return torch.where(found.any(dim=1), places, rows.shape[1])

    def _fitting(
        self, texts: Sequence[str], shown: Sequence[str], length: int, behind: str
    ) -> Tensor:
        """Return rows of `length` tokens; an error shows the text so, and what it is behind."""
        # Tokenizers cut silently. In rows longer by one, a text that does not fit ends too late.
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
        """Return the row as it would be, were it start, the words found in it, end and padding."""
        own = [*self.start, *self._between(row), self.end]
        return own + [self.pad] * (len(row) - len(own))


def _probe(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    try:
        rows: list[list[int]] = tokenizer(texts, context_length=_PROBED).tolist()
    except Exception as cause:  # tokenizers raise whatever they like
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: expected rows of one length, came "
            f"{shorten(repr(cause), 200)}; take another model"
        ) from cause
    return rows
