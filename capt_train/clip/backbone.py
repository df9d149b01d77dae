"""A frozen open_clip model: image embeddings, text embeddings, and prompts with a free context."""

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from capt_deploy.core.errors import ModelError
from capt_deploy.data.preprocess import PreprocessConfig
from capt_train.clip.colour_map import ColourMap
from capt_train.clip.open_tower import open_tower
from capt_train.clip.text_tokens import TextTokens
from capt_train.clip.text_tower import TextTower
from capt_train.clip.vision_tower import Tower
from capt_train.settings import CLIP_TEMPLATES


def all_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return templates with `{}` for the name; `openai` stands for CLIP's 80 (arXiv 2103.00020)."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    texts: list[str] = []
    for text in templates:
        known = OPENAI_IMAGENET_TEMPLATES if text == CLIP_TEMPLATES else ()
        texts += [template("{}") for template in known] or [text]
    return tuple(dict.fromkeys(texts))


class Backbone:
    """An open_clip model in float32 and evaluation mode whose parameters never change."""

    colours: ColourMap | None = None  # in front of the visual tower
    name = ""  # of the model in open_clip, as --model takes it

    def __init__(self, model: Any, tokenizer: Any, preprocess: PreprocessConfig) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.scale = float(self.model.logit_scale.exp())  # 1/τ
        # SigLIP's, of scale·f·t + bias; the same for all classes, so softmax cancels it.
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias)
        self.tokens = TextTokens(tokenizer)
        self.text = TextTower(model, self.tokens)
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.logit_scale.device  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Return a SHA-256 over weights, QuickGELU, preprocessing and the model's vocabulary."""
        digest = hashlib.sha256(json.dumps(self.preprocess.to_dict()).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        for name, module in self.model.named_modules():
            if type(module).__name__ == "QuickGELU":  # the same weights with GELU are another model
                digest.update(f"{name} QuickGELU".encode())
        digest.update(self.tokens.signature())
        return digest.hexdigest()

    @torch.no_grad()
    def image_embeddings(
        self, pixels: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch dim"]:
        """Return unit-norm embeddings f(x) of preprocessed pixels, RGB 0-255.

        Raises:
            ModelError: they are not finite.
        """
        features = self.model.encode_image(self.normalise(pixels))
        return self._finite(functional.normalize(features, dim=-1))

    def normalise(
        self, pixels: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the visual tower's input: normalised images, through the colour map if any."""
        images = (pixels.to(self.device).float() / 255 - self._mean) / self._std
        images = images.permute(0, 3, 1, 2)
        return images if self.colours is None else self.colours(images)

    def recoloured(self, colours: ColourMap | None) -> "Backbone":
        """Return the same model with another colour map, or None, in front of the visual tower."""
        other = copy.copy(self)
        other.colours = colours
        return other

    def free(self, *, text_only: bool = False) -> None:
        """Release the memory of both towers, or of the text tower; they cannot be used any more."""
        for name, parameter in self.model.named_parameters():
            if not (text_only and name.startswith("visual.")):
                parameter.data = parameter.new_empty(0)

    @cached_property
    def tower(self) -> Tower | None:
        """Return the visual tower in pieces; None where its tokens cannot be reached."""
        return open_tower(self.model.visual, self.preprocess.size)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Return unit-norm embeddings of sentences.

        Raises:
            ModelError: a text is too long for the model, or its embedding is not finite.
        """
        return self._finite(self.text.encode(self.tokenize(texts)))

    @torch.no_grad()
    def sentence_embeddings(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Return unit-norm embeddings of sentences, cut at the end where they are too long."""
        batches = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        tokens = [self.tokens.cut(batch).to(self.device) for batch in batches]
        return torch.cat([self.text.encode(part) for part in tokens])

    def class_embeddings(
        self, class_names: Sequence[str], templates: Sequence[str]
    ) -> Float[Tensor, "classes dim"]:
        """Return t⁰ (METHOD 1): the renormalised mean over templates; see `all_templates`."""
        texts = all_templates(templates)
        # one after the other: embeddings of all would be 80 times as large
        total = sum(
            self.text_embeddings([text.replace("{}", name) for name in class_names])
            for text in texts
        )
        return functional.normalize(torch.as_tensor(total) / len(texts), dim=-1)

    def _finite(self, embeddings: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Return the embeddings of the model as it came, which later steps could not repair."""
        if embeddings.isfinite().all() and math.isfinite(self.scale):
            return embeddings
        state = self.model.state_dict().items()
        damaged = [name for name, tensor in state if not tensor.isfinite().all()]
        found = f"NaN or infinity in {', '.join(damaged[:3])}" if damaged else "too large weights"
        raise ModelError(
            f"the model's own embeddings are not finite ({found}); its file is damaged or was "
            "trained without success, and no setting helps: load other weights"
        )

    def tokenize(self, texts: Sequence[str], places: int = 0) -> Int[Tensor, "texts tokens"]:
        """Return token ids, with `places` for context vectors in front of each text.

        Raises:
            ModelError: a text is longer than the model's context.
        """
        return self.tokens.whole(texts, places).to(self.device)
