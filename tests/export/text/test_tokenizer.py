"""open_clip's tokenizers without torch: the same ids for every text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from capt_deploy.bundle.manifest import OpenVocabulary
from capt_deploy.core.errors import BundleError, ModelError
from capt_deploy.serving.open_vocabulary import CLEANINGS, PromptTokenizer
from capt_train.clip.loading import load_backbone
from capt_train.clip.text_tokens import TextTokens
from export.text.tokenizer import check_tokens, cleaning_name, tokenizer_json

TRAINING = {cleaning: SimpleTokenizer(clean=cleaning) for cleaning in CLEANINGS}
JSON = tokenizer_json(TRAINING["lower"])
# Scripts that people name things in. Letters younger than a library's Unicode are none to it, and
# control characters behind accents make such letters.
RANGES = ((0, 0x7F), (0xA0, 0x33F), (0x370, 0x52F), (0x4E00, 0x9FA5), (0x1F300, 0x1F64F))
CHARACTERS = st.one_of(
    *(st.characters(min_codepoint=low, max_codepoint=high) for low, high in RANGES),
    st.sampled_from("'’“ﬁＡ&;<>_-  sStTdD01"),
)
NAMES = ("red ball", "blue sky")


def prompts(cleaning: str, content: str = JSON) -> PromptTokenizer:
    record = OpenVocabulary(("a photo of a {}.",), 77, 0, True, cleaning)
    return PromptTokenizer(record, content.encode())


@pytest.mark.parametrize("cleaning", CLEANINGS)
@settings(deadline=None, derandomize=True, max_examples=300)
@given(text=st.text(CHARACTERS, max_size=30))
def test_every_text_becomes_the_same_ids(cleaning: str, text: str) -> None:
    training = TRAINING[cleaning]
    expected = [training.sot_token_id, *training.encode(text), training.eot_token_id]
    assert BUNDLED[cleaning].ids(text) == expected


BUNDLED = {cleaning: prompts(cleaning) for cleaning in CLEANINGS}


def test_it_is_known_how_texts_are_cleaned() -> None:
    assert [cleaning_name(tokenizer) for tokenizer in TRAINING.values()] == [*CLEANINGS]


def test_the_proof_passes_for_what_is_right(family_dir: Callable[[str], Path]) -> None:
    for tokens in (TextTokens(TRAINING["lower"]), siglip(family_dir)):
        rows = torch.stack([tokens.whole([f"a photo of a {name}." for name in NAMES])], dim=1)
        tokenizer = tokens.tokenizer
        record = OpenVocabulary(
            ("a photo of a {}.",), tokens.length, tokens.pad, False, cleaning_name(tokenizer)
        )
        bundled = PromptTokenizer(record, tokenizer_json(tokenizer).encode())
        check_tokens(bundled, tokens, rows, NAMES)


def siglip(family_dir: Callable[[str], Path]) -> TextTokens:
    return load_backbone(str(family_dir("ViT-B-16-SigLIP")), None, torch.device("cpu")).tokens


def without_merges(content: dict) -> None:
    content["model"]["merges"] = content["model"]["merges"][:30000]


def words_split_by_spaces(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\S+"}


def no_end(content: dict) -> None:
    content["post_processor"]["single"].pop()


@pytest.mark.parametrize("change", [without_merges, words_split_by_spaces, no_end])
def test_the_proof_finds_a_tokenizer_that_differs(change: Callable[[dict], None]) -> None:
    content = json.loads(JSON)
    change(content)
    tokens = TextTokens(TRAINING["lower"])
    rows = torch.stack([tokens.whole([f"a photo of a {name}." for name in NAMES])], dim=1)
    with pytest.raises(ModelError, match="becomes other tokens; export without --open-vocab"):
        check_tokens(prompts("lower", json.dumps(content)), tokens, rows, NAMES)
    with pytest.raises(ModelError, match="becomes other tokens"):
        check_tokens(prompts("whitespace"), tokens, rows, NAMES)


def test_a_tokenizer_that_needs_torch_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer object: it cannot be used without torch"):
        tokenizer_json(object())


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        prompts("lower", "{}")
    with pytest.raises(ValueError, match="cleaning 'bleach': unknown; upgrade capt"):  # on loading
        prompts("bleach")
