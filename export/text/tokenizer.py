"""Convert a model's tokenizer to a `tokenizer.json`, and check that it gives the same tokens."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from capt_deploy.core.errors import ModelError
from capt_deploy.core.install import install_hint
from capt_deploy.serving.open_vocabulary import CLEANINGS, PromptTokenizer
from capt_train.clip.text_tokens import TextTokens, vocabulary

_LETTERS = re.compile("[a-z]{3,}")
_WORDS = 400  # of the vocabulary
_LENGTH = 64  # tokens of each of them, at most
# Texts, separated by |, that splitting and cleaning might get wrong.
_TRICKY = (
    "Levi's 501|it’ll won't I'd|AT&amp;T|crème brûlée|7-Up 2.5L|STOP!!! now...|東京タワー|🐱 cat|"
    "naïve—dash|a_b/c+d|ﬁg|İstanbul|Москва|ＡＢ|a\tb\nc"
)


def tokenizer_json(tokenizer: Any) -> str:
    """Return a tokenizer of open_clip in the format of the `tokenizers` library.

    Raises:
        ModelError: the library has no such tokenizer, or it is missing.
    """
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return _byte_pairs(tokenizer)
    fast = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    if fast is None:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: it cannot be used without torch, so classes "
            f"cannot be added to a bundle; export without --open-vocab"
        )
    return str(fast.to_str())


def cleaning_name(tokenizer: Any) -> str:
    """Return the name in `CLEANINGS` of the cleaning that a tokenizer applies first."""
    from open_clip.tokenizer import get_clean_fn

    clean = getattr(tokenizer, "clean_fn", None)
    names = (name for name in CLEANINGS if get_clean_fn(name) is clean)
    return next(names, "canonicalize")  # the only one of SigLipTokenizer


def _byte_pairs(tokenizer: Any) -> str:
    """Return CLIP's tokenizer: words split by a pattern, as bytes, merged in pairs."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    except ImportError as cause:
        raise ModelError(
            f"--open-vocab needs the package tokenizers: {install_hint('open-vocab')}"
        ) from cause
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    converted = Tokenizer(models.BPE(tokenizer.encoder, merges, end_of_word_suffix="</w>"))
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.add_special_tokens([tokenizer.decoder[i] for i in tokenizer.all_special_ids])
    converted.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)],
    )
    return str(converted.to_str())


def check_tokens(
    bundled: PromptTokenizer,
    tokens: TextTokens,
    expected: Int[Tensor, "names prompts tokens"],
    names: Sequence[str],
) -> None:
    """Check that a bundle's tokenizer gives the ids of the training's tokenizer.

    Args:
        bundled: the bundle's tokenizer.
        tokens: the training's tokenizer.
        expected: ids of each prompt with each of the names, by the training's tokenizer.
        names: of classes.

    Raises:
        ModelError: ids differ for a prompt with one of the names, a word of the vocabulary, or one
            of a few tricky texts.
    """
    ids = torch.from_numpy(bundled.rows(names))
    _refuse_differences(names, expected[:, :, : ids.shape[2]].flatten(1), ids.flatten(1))
    texts = [*_TRICKY.split("|"), *_some_words(tokens)]
    lists = [bundled.ids(text) for text in texts]
    padded = torch.tensor(
        [text_ids + [tokens.pad] * (_LENGTH - len(text_ids)) for text_ids in lists]
    )
    _refuse_differences(texts, tokens.tokenizer(texts, context_length=_LENGTH), padded)


def _some_words(tokens: TextTokens) -> list[str]:
    matches = (_LETTERS.search(entry) for entry in vocabulary(tokens.tokenizer))
    words = sorted({match[0] for match in matches if match})
    return words[:: max(1, len(words) // _WORDS)]


def _refuse_differences(texts: Sequence[str], expected: Tensor, ids: Tensor) -> None:
    differ = (expected != ids).any(dim=1)
    if differ.any():
        raise ModelError(
            f"the tokenizer cannot be converted: {texts[int(differ.nonzero()[0])]!r} becomes other "
            f"tokens; export without --open-vocab"
        )
