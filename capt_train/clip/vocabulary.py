"""The whole words that a tokenizer knows."""

import re
from collections.abc import Mapping
from typing import Any

from capt_deploy.core.errors import ModelError

# Byte-pair entries that close a word end in `</w>`, SentencePiece's that open one begin with ▁;
# shorter ones are mostly parts of words.
_WHOLE_WORD = re.compile("([a-z]{3,})</w>|▁([a-z]{3,})")


def whole_words(tokenizer: Any) -> list[str]:
    """Return the lower-case words of three letters or more that are one token each, sorted.

    SentencePiece does not say what closes a word, so some of its words are only beginnings.

    Args:
        tokenizer: open_clip's own with its table `encoder`, or one around a Hugging Face tokenizer.

    Raises:
        ModelError: the tokenizer has no such table, or no whole words in it.
    """
    found = (_WHOLE_WORD.fullmatch(entry) for entry in vocabulary(tokenizer))
    words = sorted({match[1] or match[2] for match in found if match})
    inner = getattr(tokenizer, "tokenizer", None)
    if words and inner is not None:  # units are chosen by probability, so a longer one may lose
        units = inner(words, add_special_tokens=False).input_ids
        words = [word for word, own in zip(words, units, strict=True) if len(own) == 1]
    if not words:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: its words cannot be listed; expected a table "
            f"with entries like 'otter</w>' or '▁otter'; tune without the mixture"
        )
    return words


def vocabulary(tokenizer: Any) -> Mapping[str, int]:
    """Return the table of a tokenizer, entry to id; empty where it has none."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    table = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(tokenizer, "encoder", {})
    return table if isinstance(table, Mapping) else {}
