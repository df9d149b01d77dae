"""Real architectures with random weights, and a tokenizer like SigLIP's: nothing is fetched.

What a model can be given, and how long it takes, depends on its shape alone, not on its weights.

    python -m benchmarks.random_models ViT-B-16 FOLDER PHOTOS
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import get_model_preprocess_cfg
from safetensors.torch import save_file
from torch import nn

from capt_deploy.data.folders import find_files
from capt_deploy.data.preprocess import PreprocessConfig, preprocess
from capt_train.clip.backbone import Backbone

# Longer words come in pieces too, so that there is something to choose.
_WORDS = """a an the of in on with and photo picture drawing blurred small large black white red
blue green grey yellow sky leaf stone ball cat dog bird boat horse flower bridge lamp chair river
window garden mountain"""
_SETTLED_ON = 32  # photos
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_UNKNOWN
    )
    fast.save_pretrained(folder)


def random_backbone(name: str, seed: int = 0) -> Backbone:
    """Return an architecture of open_clip's, at its real size, with random weights.

    A Hugging Face tokenizer of its own is replaced by that of `write_tokenizer`.
    """
    network = _random_network(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        _write_config(name, network, Path(folder))
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = PreprocessConfig.from_dict(get_model_preprocess_cfg(network))
    return Backbone(network, tokenizer, preprocess)


def write_random_model(name: str, folder: Path, photos: Path, seed: int = 0) -> None:
    """Write such a model as a `local-dir`.

    Its batch norms get the statistics of the photos below a folder: with those of the start, the
    features of all images would be the same.
    """
    network = _random_network(name, seed)
    preprocess = PreprocessConfig.from_dict(get_model_preprocess_cfg(network))
    _settle(network.visual, preprocess, find_files(photos).paths)
    folder.mkdir(parents=True)
    _write_config(name, network, folder)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _random_network(name: str, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.create_model(name, pretrained=None, pretrained_text=False)


def _write_config(name: str, network: Any, folder: Path) -> None:
    config: dict[str, Any] = open_clip.get_model_config(name)
    described = {"model_cfg": config, "preprocess_cfg": get_model_preprocess_cfg(network)}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)


@torch.no_grad()
def _settle(visual: nn.Module, config: PreprocessConfig, photos: list[Path]) -> None:
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    pixels = np.stack([preprocess(photo, config) for photo in photos[:_SETTLED_ON]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (config.mean, config.std))
    for norm in norms:
        norm.momentum = None  # a plain mean over what it sees
    visual.train()
    visual((images - mean) / std)
    visual.eval()


if __name__ == "__main__":
    write_random_model(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
