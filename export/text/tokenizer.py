"""A model's tokenizer as a `tokenizer.json`, and the proof that it says the same."""

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
_ROOM = 64  # tokens that each of these may take
# What splitting and cleaning might get wrong.
_ODD = (
    *("Levi's 501", "it’ll won't I'd", "AT&amp;T", "crème brûlée", "7-Up 2.5L", "STOP!!! now..."),
    *(
        "東京タワー",
        "🐱 cat",
        "naïve—dash",
        "a_b/c+d",
        "ﬁg",
        "İstanbul",
        "Москва",
        "ＡＢ",
        "a\tb\nc",
    ),
)


def tokenizer_json(tokenizer: Any) -> str:
    """Return what the `tokenizers` library reads, of one of open_clip's tokenizers.

    Raises:
        ModelError: it is none that the library can be, or the library is missing.
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


def cleaning_of(tokenizer: Any) -> str:
    """Return the name under which `CLEANINGS` has what a tokenizer does to texts first."""
    from open_clip.tokenizer import get_clean_fn

    own = getattr(tokenizer, "clean_fn", None)
    found = [name for name in CLEANINGS if get_clean_fn(name) is own]
    return found[0] if found else "canonicalize"  # SigLipTokenizer's only one


def _byte_pairs(tokenizer: Any) -> str:
    """Return CLIP's own tokenizer: words by a pattern, as bytes, merged in pairs."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    except ImportError as cause:
        raise ModelError(
            f"--open-vocab needs the package tokenizers: {install_hint('open-vocab')}"
        ) from cause
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    own = Tokenizer(models.BPE(tokenizer.encoder, merges, end_of_word_suffix="</w>"))
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own.add_special_tokens([tokenizer.decoder[i] for i in tokenizer.all_special_ids])
    own.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)],
    )
    return str(own.to_str())


def prove_tokens(
    bundled: PromptTokenizer,
    tokens: TextTokens,
    wanted: Int[Tensor, "names prompts tokens"],
    names: Sequence[str],
) -> None:
    """Make sure that a bundle's tokenizer gives the very ids that the training's gives.

    Args:
        bundled: the bundle's.
        tokens: the training's.
        wanted: ids of each prompt with each of the names, by the training's tokenizer.
        names: of classes.

    Raises:
        ModelError: it gives others for a prompt with one of the names, a word of the vocabulary,
            or one of a few odd texts.
    """
    found = torch.from_numpy(bundled.rows(names))
    _refuse_differences(names, wanted[:, :, : found.shape[2]].flatten(1), found.flatten(1))
    listed = [*_ODD, *_some_words(tokens)]
    expected = tokens.tokenizer(listed, context_length=_ROOM)
    ids = [bundled.ids(text) for text in listed]
    padded = torch.tensor([own + [tokens.pad] * (_ROOM - len(own)) for own in ids])
    _refuse_differences(listed, expected, padded)


def _some_words(tokens: TextTokens) -> list[str]:
    found = (_LETTERS.search(entry) for entry in vocabulary(tokens.tokenizer))
    words = sorted({match[0] for match in found if match})
    return words[:: max(1, len(words) // _WORDS)]


def _refuse_differences(texts: Sequence[str], expected: Tensor, found: Tensor) -> None:
    differ = (expected != found).any(dim=1)
    if differ.any():
        raise ModelError(
            f"the tokenizer cannot be had without torch: {texts[int(differ.nonzero()[0])]!r} "
            f"becomes other tokens; export without --open-vocab"
        )
