"""A frozen open_clip model: image embeddings, text embeddings, and prompts with a free context."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.errors import ModelError
from capt_deploy.preprocess import PreprocessConfig
from capt_train.colour_map import ColourMap
from capt_train.vision_tower import Tower, open_tower
from capt_train.vocabulary import whole_words


class Backbone:
    """An open_clip model in float32 and evaluation mode whose parameters never change."""

    colours: ColourMap | None = None  # in front of the tower

    def __init__(self, model: Any, tokenizer: Any, preprocess: PreprocessConfig) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.scale = float(self.model.logit_scale.exp())  # 1/τ
        # SigLIP's, of scale·f·t + bias; the same for all classes, so no softmax ever sees it.
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias)
        self._tokenizer = tokenizer
        self._tower: Any = getattr(model, "text", model)  # CLIP keeps its text tower inline
        self._embedding = _token_embedding(model)
        # Everything after [EOS] is invisible to a causal tower, so prompts may be cut there, unless
        # the tower looks at its last place whatever stands there.
        pooling = getattr(model, "text_pool_type", getattr(self._tower, "pool_type", None))
        self._cuttable = (
            getattr(self._tower, "attn_mask", None) is not None
            and getattr(self._tower, "cls_emb", None) is None
            and pooling in ("argmax", "eos")
        )
        self._text_blocks: Any = getattr(
            getattr(self._tower, "transformer", None), "resblocks", None
        )
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.logit_scale.device  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Return a SHA-256 over all weights and the preprocessing."""
        digest = hashlib.sha256(json.dumps(self.preprocess.to_dict()).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def image_embeddings(
        self, pixels: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch dim"]:
        """Return unit-norm embeddings f(x) of preprocessed pixels, RGB 0-255."""
        return functional.normalize(self.model.encode_image(self.normalise(pixels)), dim=-1)

    def normalise(
        self, pixels: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return what the visual tower takes."""
        images = (pixels.to(self.device).float() / 255 - self._mean) / self._std
        images = images.permute(0, 3, 1, 2)
        return images if self.colours is None else self.colours(images)

    def recoloured(self, colours: ColourMap | None) -> "Backbone":
        """Return the same model with a map of its own in front of the tower."""
        other = copy.copy(self)
        other.colours = colours
        return other

    @cached_property
    def tower(self) -> Tower | None:
        """The visual tower in pieces; None where its tokens cannot be reached."""
        return open_tower(self.model.visual, self.preprocess.size)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Return unit-norm embeddings of sentences."""
        return self.encode(self.tokenize(texts))

    @torch.no_grad()
    def sentence_embeddings(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Return unit-norm embeddings of sentences, cut at the end where they are too long."""
        batches = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        tokens = [self._tokenizer(list(batch)).to(self.device) for batch in batches]
        return torch.cat([self.encode(part) for part in tokens])

    def words_known(self) -> list[str]:
        """Return the whole words of the tokenizer's vocabulary, sorted.

        Raises:
            ModelError: its vocabulary cannot be listed.
        """
        return whole_words(self._tokenizer)

    def class_embeddings(
        self, class_names: Sequence[str], templates: Sequence[str]
    ) -> Float[Tensor, "classes dim"]:
        """Return t⁰: the renormalised mean over templates, each with `{}` for the name."""
        per_template = [
            self.text_embeddings([template.replace("{}", name) for name in class_names])
            for template in templates
        ]
        return functional.normalize(torch.stack(per_template).mean(dim=0), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "texts tokens"]:
        """Return token ids, [SOS] first and padded behind [EOS].

        Raises:
            ModelError: a text is longer than the model's context.
        """
        tokens: Tensor = self._tokenizer(list(texts)).to(self.device)
        # The tokenizer cuts silently; a text that needs the last place may have been cut.
        full = tokens[:, -1] == self._tokenizer.eot_token_id
        if full.any():
            text = texts[int(full.nonzero()[0])]
            raise ModelError(
                f"too long for the model's {tokens.shape[1]} tokens: {text!r}; "
                f"shorten the class name (--class-names) or the prompt"
            )
        return tokens

    def words(self, text: str) -> Int[Tensor, " tokens"]:
        """Return the token ids of `text` without [SOS], [EOS] and padding."""
        tokens = self.tokenize([text])[0]
        return tokens[1 : int((tokens == self._tokenizer.eot_token_id).nonzero()[0])]

    def token_vectors(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens width"]:
        """Return the embedding table's rows for token ids."""
        return self._embedding.weight[tokens].detach().clone()

    def encode(
        self,
        tokens: Int[Tensor, "texts tokens"],
        context: Float[Tensor, "*texts context width"] | None = None,
        deeper: Float[Tensor, "blocks context width"] | None = None,
    ) -> Float[Tensor, "texts dim"]:
        """Return unit-norm text embeddings; gradients reach `context`, never the tower.

        `context` takes the place of the vectors right behind [SOS], whatever tokens stand there:
        one for all texts, or one for each. The model's own `encode_text` does the rest, so every
        tower that open_clip builds works, pooling and projection included. `deeper` does the same
        in the second block, the third, and so on.

        Raises:
            ModelError: `deeper` asks for more blocks than can be reached.
        """
        with self._replaced_context(context), self._replaced_deeper(deeper):
            if not self._cuttable:
                return functional.normalize(self.model.encode_text(tokens), dim=-1)
            ends = (tokens == self._tokenizer.eot_token_id).int().argmax(dim=1)
            length = int(ends.max()) + 1
            prefix = "" if self._tower is self.model else "text."
            cut = {
                f"{prefix}positional_embedding": self._tower.positional_embedding[:length],
                f"{prefix}attn_mask": self._tower.attn_mask[:length, :length],
            }
            features = torch.func.functional_call(
                _TextOnly(self.model), {f"model.{k}": v for k, v in cut.items()}, tokens[:, :length]
            )
        return functional.normalize(features, dim=-1)

    def check_text_depth(self, depth: int) -> None:
        """Make sure that context vectors can be put into the first `depth` blocks.

        Raises:
            ModelError: there are not so many blocks that can be reached.
        """
        reached = 1 if self._text_blocks is None else len(self._text_blocks)
        if depth > reached:
            raise ModelError(
                f"text_depth: context vectors in {depth} blocks are asked for, the model's text "
                f"tower has {reached} that can be reached; set text_depth={reached}"
            )

    @contextmanager
    def _replaced_context(self, context: Tensor | None) -> Iterator[None]:
        if context is None:
            yield
            return

        def replace(module: nn.Module, arguments: Any, vectors: Tensor) -> Tensor:
            own = context.expand(len(vectors), -1, -1).to(vectors.dtype)
            return torch.cat([vectors[:, :1], own, vectors[:, 1 + own.shape[1] :]], dim=1)

        handle = self._embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _replaced_deeper(self, deeper: Tensor | None) -> Iterator[None]:
        if deeper is None:
            yield
            return
        self.check_text_depth(len(deeper) + 1)
        blocks = self._text_blocks
        batch_first = getattr(self._tower.transformer, "batch_first", True)
        with ExitStack() as stack:
            for block, own in zip(blocks[1:], deeper, strict=False):
                hook = partial(_replace_tokens, own=own, axis=1 if batch_first else 0)
                stack.callback(block.register_forward_pre_hook(hook).remove)
            yield


def _replace_tokens(
    _: nn.Module, arguments: tuple[Tensor, ...], own: Tensor, axis: int
) -> tuple[Tensor, ...]:
    """Put `own` behind the first token, on the token axis (0 or 1)."""
    tokens, *others = arguments
    before, _, after = tokens.split([1, len(own), tokens.shape[axis] - 1 - len(own)], dim=axis)
    batch = tokens.shape[1 - axis]
    own = own.to(tokens.dtype).unsqueeze(1 - axis)
    own = own.expand(*((batch, -1, -1) if axis else (-1, batch, -1)))
    return (torch.cat([before, own, after], dim=axis), *others)


class _TextOnly(nn.Module):
    """Gives `functional_call` a module whose forward is `encode_text`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)  # type: ignore[no-any-return]


def _token_embedding(model: Any) -> nn.Embedding:
    for owner in (model, getattr(model, "text", None)):
        found = getattr(owner, "token_embedding", None)
        if isinstance(found, nn.Embedding):
            return found
    raise ModelError(f"{type(model).__name__}: its text tower has no token embedding to tune")
