"""A frozen text tower: token ids to embeddings, with free vectors in the place of words."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from capt_deploy.core.errors import ModelError
from capt_train.clip.text_tokens import TextTokens

# Tokens at once, which bounds the memory: a step with ViT-B/16's tower keeps 0.4 MB of each for the
# way back, in float32. Several prompts keep as many each, and larger towers more of each.
_AT_ONCE = 4096
_TOKEN_BYTES = 2**20  # reckoned for each on a GPU, which takes more where a quarter of it is enough


def _tokens_at_once(device: torch.device) -> int:
    """Return how many tokens are in memory at once."""
    return _AT_ONCE if device.type != "cuda" else max(_AT_ONCE, _tokens_on_gpu(device))


@cache  # memory that torch keeps for later steps is no longer free
def _tokens_on_gpu(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4 // _TOKEN_BYTES


class TextTower:
    """The text side of an open_clip model, used through the model's own `encode_text`."""

    def __init__(self, model: Any, tokens: TextTokens) -> None:
        self._model, self._tokens = model, tokens
        self._tower: Any = getattr(model, "text", model)  # CLIP keeps its text tower inline
        self._transformer: Any = getattr(self._tower, "transformer", None)
        self.cuttable = self._ignores_padding()  # rows of token ids may be cut behind their ends
        self._blocks: Any = getattr(self._transformer, "resblocks", None)

    def vectors(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
        """Return the vectors that the tower looks up for token ids.

        Raises:
            ModelError: the tower takes no vectors in their place, so no prompt can be learned.
        """
        table = self._embedding
        return table(tokens.to(table.weight.device)).detach().clone()  # type: ignore[no-any-return]

    def encode(
        self,
        tokens: Int[Tensor, "texts tokens"],
        context: Float[Tensor, "*texts context width"] | None = None,
        deeper: Float[Tensor, "blocks context width"] | None = None,
        updates: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Float[Tensor, "texts dim"]:
        """Return unit-norm text embeddings; gradients reach `context`, never the tower.

        The model's own `encode_text` does the work, so every tower that open_clip builds will do,
        pooling and projection included. Of many texts, only a part is in memory at once: gradients
        of all parts but the last compute it again (gradient checkpointing, arXiv 1604.06174).

        Args:
            tokens: rows of token ids, as by `TextTokens`.
            context: vectors in place of the first tokens, behind [SOS] where there is one: the same
                for all texts, or a context for each.
            deeper: vectors for the same places in the second block, the third, and so on.
            updates: additions to weights of the tower, by the names of the weights.

        Raises:
            ModelError: `deeper` needs more blocks than can be reached.
        """
        changed = {name: self.weight(name) + update for name, update in updates.items()}
        length, exporting = tokens.shape[1], torch.compiler.is_exporting()
        if self.cuttable:
            if not exporting:  # a graph gets rows that have been cut
                length = int(self._tokens.ends(tokens).max()) + 1
            changed["positional_embedding"] = self._tower.positional_embedding[:length]
            changed["attn_mask"] = self._tower.attn_mask[:length, :length]
        tokens, at_once = tokens[:, :length], max(1, _tokens_at_once(tokens.device) // length)
        if exporting or len(tokens) <= at_once:
            return self._encode(tokens, context, deeper, changed)
        parts = tokens.split(at_once)
        contexts = [context] * len(parts)
        if context is not None and context.dim() == 3:  # one for each text
            contexts = [*context.split(at_once)]
        # Gradients pass through the last part first, so it would gain nothing.
        *before, last = zip(parts, contexts, strict=True)
        embeddings = [
            checkpoint(
                self._encode,
                *(part, vectors, deeper, changed),
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn
            )
            for part, vectors in before
        ]
        return torch.cat([*embeddings, self._encode(*last, deeper, changed)])

    def _encode(
        self,
        tokens: Int[Tensor, "texts tokens"],
        context: Float[Tensor, "*texts context width"] | None,
        deeper: Float[Tensor, "blocks context width"] | None,
        changed: Mapping[str, Tensor],
    ) -> Float[Tensor, "texts dim"]:
        """Return the embeddings of rows that are cut, with `changed` weights in the tower."""
        prefix = "model." if self._tower is self._model else "model.text."
        with self._replaced_context(context), self._replaced_deeper(deeper):
            features = torch.func.functional_call(
                _TextOnly(self._model),
                {f"{prefix}{name}": value for name, value in changed.items()},
                tokens,
            )
        return functional.normalize(features, dim=-1)

    @property
    def depth(self) -> int:
        """Return in how many blocks context vectors can be put."""
        return 1 if self._blocks is None else len(self._blocks)

    def weight(self, name: str) -> Tensor:
        """Return a weight of the tower."""
        return self._tower.get_parameter(name)  # type: ignore[no-any-return]

    def attention_weights(self) -> dict[str, int]:
        """Return the names of the stacked weights of query, key and value, and how many are in it.

        Empty for towers that are not open_clip's own.
        """
        return {
            f"transformer.{name}.in_proj_weight": 3
            for name, module in self._modules()
            if getattr(module, "in_proj_weight", None) is not None
        }

    def norm_weights(self) -> list[str]:
        """Return the names of gains and biases of the LayerNorms."""
        norms = [
            f"transformer.{name}" for name, m in self._modules() if isinstance(m, nn.LayerNorm)
        ]
        norms += (
            ["ln_final"] if isinstance(getattr(self._tower, "ln_final", None), nn.LayerNorm) else []
        )
        return [
            f"{name}.{parameter}"
            for name in norms
            for parameter, _ in self._tower.get_submodule(name).named_parameters(recurse=False)
        ]

    def _modules(self) -> list[tuple[str, nn.Module]]:
        return [] if self._transformer is None else [*self._transformer.named_modules()]

    def check_depth(self, depth: int) -> None:
        """Check that context vectors can be put into the first `depth` blocks.

        Raises:
            ModelError: fewer blocks can be reached.
        """
        if depth > self.depth:
            raise ModelError(
                f"--set prompt.depth: expected at most {self.depth}, the blocks of this text tower "
                f"that can be reached; came {depth}"
            )

    def _ignores_padding(self) -> bool:
        """Tell whether nothing behind the end token changes an embedding.

        True of causal towers that pool at the end token, or at the highest id if padding is lower.
        """
        kind = getattr(self._model, "text_pool_type", getattr(self._tower, "pool_type", ""))
        marked = getattr(self._model, "text_eos_id", getattr(self._tower, "eos_id", None))
        tokens = self._tokens
        pools_before = {"argmax": tokens.pad <= tokens.end, "eos": marked == tokens.end}
        return (
            getattr(self._tower, "attn_mask", None) is not None
            and getattr(self._tower, "cls_emb", None) is None
            and pools_before.get(str(kind), False)
        )

    @cached_property
    def _embedding(self) -> nn.Embedding:
        """Return the table in which the tower looks its tokens up, tested by one look-up."""
        table: Any = getattr(self._tower, "token_embedding", None)
        if table is None and hasattr(self._transformer, "get_input_embeddings"):
            table = self._transformer.get_input_embeddings()  # of a Hugging Face tower
        lookups: list[bool] = []
        if isinstance(table, nn.Embedding):
            handle = table.register_forward_hook(lambda *_: lookups.append(True))
            try:
                self.encode(self._tokens.whole(["a"]).to(table.weight.device))
            finally:
                handle.remove()
        if not lookups:
            raise ModelError(
                f"text tower {type(self._tower).__name__}: no vectors can be put in the place of "
                f"its tokens; tune without a learned prompt (--without prompt)"
            )
        return table  # type: ignore[no-any-return]

    @contextmanager
    def _replaced_context(self, context: Tensor | None) -> Iterator[None]:
        if context is None:
            yield
            return
        first = self._tokens.leading

        def replace(module: nn.Module, arguments: Any, vectors: Tensor) -> Tensor:
            learned = context.expand(vectors.shape[0], -1, -1).to(vectors.dtype)
            behind = vectors[:, first + learned.shape[1] :]
            return torch.cat([vectors[:, :first], learned, behind], dim=1)

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
        self.check_depth(len(deeper) + 1)
        axis = 1 if getattr(self._transformer, "batch_first", True) else 0
        with ExitStack() as stack:
            for block, context in zip(self._blocks[1:], deeper, strict=False):
                hook = partial(
                    _replace_tokens, context=context, first=self._tokens.leading, axis=axis
                )
                stack.callback(block.register_forward_pre_hook(hook).remove)
            yield


def _replace_tokens(
    _: nn.Module, arguments: tuple[Tensor, ...], context: Tensor, first: int, axis: int
) -> tuple[Tensor, ...]:
    """Put `context` in from place `first` on, on the token axis (0 or 1)."""
    tokens, *rest = arguments
    sizes = [first, len(context), tokens.shape[axis] - first - len(context)]
    before, _, after = tokens.split(sizes, dim=axis)
    batch = tokens.shape[1 - axis]
    context = context.to(tokens.dtype).unsqueeze(1 - axis)
    context = context.expand(*((batch, -1, -1) if axis else (-1, batch, -1)))
    return (torch.cat([before, context, after], dim=axis), *rest)


class _TextOnly(nn.Module):
    """A module whose forward is `encode_text`, as `functional_call` expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)  # type: ignore[no-any-return]
