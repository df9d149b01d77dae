from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from capt_deploy.core.errors import ModelError
from capt_deploy.data.preprocess import preprocess
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone

CPU = torch.device("cpu")
WEIGHTS = "open_clip_model.safetensors"
TEXTS = [
    "a",
    "a photo of a cat.",
    "one two three four five six seven eight nine",
    "a photo of a very small grey cat in a box.",  # fills all but the last place
]
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "custom text": {"custom_text": True},
    "timm tower": {
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
    },
    "bidirectional text": {
        "custom_text": True,
        "text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "causal text pooled at its last place": {
        "custom_text": True,
        "text_cfg": {"pool_type": "last"},
    },
    "text with a class token": {"custom_text": True, "text_cfg": {"embed_cls": True}},
    "resnet and quick gelu": {"quick_gelu": True, "vision_cfg": {"layers": [1, 1, 1, 1]}},
    "scale and bias of a sigmoid": {"init_logit_scale": 2.3, "init_logit_bias": -10.0},
    "scale and bias of shape 1": {"nonscalar_logit_scale": True, "init_logit_bias": -10.0},
}


@pytest.fixture
def own_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "own"))


def opened(folder: Path) -> tuple[Any, Any, Any]:
    """Return model, transform and tokenizer as open_clip itself makes them."""
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_embeddings_equal_open_clips_own(
    variant: str, write_model: Callable[..., Path]
) -> None:
    folder = write_model(**VARIANTS[variant])
    model, _, tokenizer = opened(folder)
    backbone = load_backbone(str(folder), None, CPU)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(backbone.text_embeddings(TEXTS), expected, rtol=0, atol=2e-6)
    for text, row in zip(TEXTS, expected, strict=True):  # each is cut to a length of its own
        alone = backbone.text_embeddings([text])
        torch.testing.assert_close(alone[0], row, rtol=0, atol=2e-6)
    assert backbone.scale == pytest.approx(model.logit_scale.exp().item())
    bias = VARIANTS[variant].get("init_logit_bias", 0.0)
    assert backbone.logit_bias == bias == (0.0 if model.logit_bias is None else model.logit_bias)


@pytest.mark.parametrize("variant", ["clip", "timm tower"])
def test_image_embeddings_equal_open_clips_own(
    variant: str, write_model: Callable[..., Path]
) -> None:
    folder = write_model(**VARIANTS[variant])
    model, transform, _ = opened(folder)
    backbone = load_backbone(f"local-dir:{folder}", None, CPU)
    images = [photo(20, 20), photo(33, 17, 1), photo(16, 50, 2)]
    pixels = torch.from_numpy(np.stack([preprocess(i, backbone.preprocess) for i in images]))
    with torch.no_grad():
        expected = model.encode_image(torch.stack([transform(i) for i in images]), normalize=True)
    torch.testing.assert_close(backbone.image_embeddings(pixels), expected, rtol=0, atol=1e-5)


def test_class_embeddings_are_the_renormalised_mean_over_templates(
    tiny_backbone: Backbone,
) -> None:
    names, templates = ["cat", "big dog"], ["a photo of a {}.", "{} drawn as a {}."]
    sentences = [
        [f"a photo of a {name}." for name in names],
        [f"{name} drawn as a {name}." for name in names],
    ]
    first, second = (tiny_backbone.text_embeddings(texts) for texts in sentences)
    expected = normalize((first + second) / 2, dim=1)
    torch.testing.assert_close(tiny_backbone.class_embeddings(names, templates), expected)


def test_text_that_does_not_fit_is_refused_by_name(
    tiny_backbone: Backbone,
) -> None:
    assert tiny_backbone.tokenize(["cat " * 14]).shape == (1, 16)
    with pytest.raises(ModelError, match=r"too long for the model's 16 tokens: 'dog dog.*shorten"):
        tiny_backbone.tokenize(["cat", "dog " * 15])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["visual.proj", "text_projection", "logit_scale"])
def test_embeddings_that_are_not_finite_name_the_damaged_weights(
    name: str, value: float, own_model: Path
) -> None:
    state = load_file(own_model / WEIGHTS)
    state[name].view(-1)[0] = value
    save_file(state, own_model / WEIGHTS)
    backbone = load_backbone(str(own_model), None, CPU)
    pixels = torch.tensor(preprocess(photo(16, 16), backbone.preprocess))[None]
    with pytest.raises(ModelError, match=rf"not finite \(NaN or infinity in {name}\)"):
        backbone.image_embeddings(pixels), backbone.text_embeddings(TEXTS)


def test_fingerprint_is_that_of_content_not_of_place(
    own_model: Path, tiny_backbone: Backbone
) -> None:
    assert load_backbone(str(own_model), None, CPU).fingerprint() == tiny_backbone.fingerprint()


def test_fingerprint_changes_with_one_weight(own_model: Path, tiny_backbone: Backbone) -> None:
    state = load_file(own_model / WEIGHTS)
    state["visual.proj"][0, 0] += 1e-3
    save_file(state, own_model / WEIGHTS)
    assert load_backbone(str(own_model), None, CPU).fingerprint() != tiny_backbone.fingerprint()


@pytest.mark.parametrize(
    "change", [{"interpolation": "bilinear"}, {"mean": [0.5, 0.5, 0.5]}, {"resize_mode": "squash"}]
)
def test_fingerprint_changes_with_preprocessing(
    change: dict[str, Any], own_model: Path, tiny_backbone: Backbone
) -> None:
    config = json.loads((own_model / "open_clip_config.json").read_text())
    (own_model / "open_clip_config.json").write_text(
        json.dumps({**config, "preprocess_cfg": change})
    )
    assert load_backbone(str(own_model), None, CPU).fingerprint() != tiny_backbone.fingerprint()
