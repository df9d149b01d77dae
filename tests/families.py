"""Every family of models, small: their own code and settings, with few blocks, channels, pixels.

Importing this makes the small towers known to timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
import timm
from timm.models import register_model

_VIT: Mapping[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4}
_MCI: Mapping[str, Any] = {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}
# Name of a small tower: the original, and what is smaller about it.
_TOWERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "small_eva02": (
        "eva02_base_patch16_clip_224",
        {**_VIT, "embed_dim": 48, "ref_feat_shape": (4, 4)},
    ),
    "small_gap": ("vit_medium_patch16_gap_256", {**_VIT, "embed_dim": 48}),
    "small_siglip": ("vit_base_patch16_siglip_224", {**_VIT, "embed_dim": 32}),
    # its stem is as wide as it is
    "small_mci_vit": ("vit_base_mci_224", {"img_size": 32, "depth": 2, "mlp_ratio": 0.5}),
    "small_mci0": ("fastvit_mci0", _MCI),
    "small_mci1": ("fastvit_mci1", _MCI),
}
# The visual side of each family's small version.
_VISION: Mapping[str, Mapping[str, Any]] = {
    "ViT-B-16": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "RN50": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
    "EVA02-B-16": {"image_size": 32, "timm_model_name": "small_eva02"},
    "vit_medium_patch16_gap_256": {"image_size": 32, "timm_model_name": "small_gap"},
    "MobileCLIP-S1": {"image_size": 64, "timm_model_name": "small_mci1"},
    "MobileCLIP-B": {"image_size": 32, "timm_model_name": "small_mci_vit"},
    "MobileCLIP2-S0": {"image_size": 64, "timm_model_name": "small_mci0"},
    "ViT-B-16-SigLIP": {"image_size": 32, "timm_model_name": "small_siglip"},
}
FAMILIES = tuple(_VISION)


def family(name: str) -> dict[str, Any]:
    """Return open_clip's own settings of a model, made small."""
    config: dict[str, Any] = open_clip.get_model_config(name)
    text = {**config["text_cfg"], "context_length": 16, "width": 32, "heads": 2, "layers": 2}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = 128
    return {
        **config,
        "embed_dim": 32,
        "vision_cfg": {**config["vision_cfg"], **_VISION[name]},
        "text_cfg": text,
    }


def _register(name: str, original: str, smaller: Mapping[str, Any]) -> None:
    def tower(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model(original, pretrained=pretrained, **{**smaller, **options})

    tower.__name__ = name
    register_model(tower)


for _name, (_original, _smaller) in _TOWERS.items():
    _register(_name, _original, _smaller)
