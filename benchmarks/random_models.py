"""Real architectures with random weights, and a tokenizer like SigLIP's: nothing is fetched.

What a model can be given, and how long it takes, depends on its shape alone, not on its weights.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import get_model_preprocess_cfg

from capt_deploy.preprocess import PreprocessConfig
from capt_train.backbone import Backbone

# Longer words come in pieces too, so that there is something to choose.
_WORDS = """a an the of in on with and photo picture drawing blurred small large black white red
blue green grey yellow sky leaf stone ball cat dog bird boat horse flower bridge lamp chair river
window garden mountain"""
_END, _UNKNOWN = "</s>", "<unk>"


def write_tokenizer(folder: Path) -> None:
    """Write a SentencePiece-like tokenizer for a `local-dir` of open_clip's.

    As SigLIP's: nothing in front of the words, 1 is the end and the padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = _WORDS.split()
    beginnings = sorted({f"▁{word[:3]}" for word in words if len(word) > 4})
    units = [
        *(("<pad>", 0.0), (_END, 0.0), (_UNKNOWN, 0.0)),
        *((f"▁{word}", -4.0) for word in words),
        *((unit, -6.0) for unit in beginnings),
        *((unit, -8.0) for unit in ("▁", *letters)),
    ]
    tokenizer = Tokenizer(models.Unigram(units, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, 1)]
    )
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_UNKNOWN
    )
    own.save_pretrained(folder)


def random_backbone(name: str, seed: int = 0) -> Backbone:
    """Return an architecture of open_clip's, at its real size, with random weights.

    A Hugging Face tokenizer of its own is replaced by that of `write_tokenizer`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = open_clip.create_model(name, pretrained=None, pretrained_text=False)
    config: dict[str, Any] = open_clip.get_model_config(name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        if "hf_tokenizer_name" in config["text_cfg"]:
            write_tokenizer(Path(folder))
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = PreprocessConfig.from_dict(get_model_preprocess_cfg(network))
    return Backbone(network, tokenizer, preprocess)
