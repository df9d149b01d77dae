"""The whole words that a tokenizer knows."""

import re
from collections.abc import Mapping
from typing import Any

from capt_deploy.errors import ModelError

# Byte-pair entries that close a word end in `</w>`; shorter ones are mostly endings, not words.
_CLOSED_WORD = re.compile("([a-z]{3,})</w>")


def whole_words(tokenizer: Any) -> list[str]:
    """Return the lower-case words of three letters or more that are one token each, sorted.

    Args:
        tokenizer: a byte-pair tokenizer with the table `encoder`, as open_clip's own.

    Raises:
        ModelError: the tokenizer has no such table, or no whole words in it.
    """
    table = getattr(tokenizer, "encoder", None)
    entries = table if isinstance(table, Mapping) else {}
    found = (_CLOSED_WORD.fullmatch(entry) for entry in entries)
    words = sorted({match[1] for match in found if match})
    if not words:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: its words cannot be listed; expected a "
            f"byte-pair table like that of open_clip's SimpleTokenizer"
        )
    return words
