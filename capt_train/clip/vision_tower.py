"""A frozen ViT in pieces, so that adapters go between attention and FFN and experts into the FFN.

open_clip's own ViTs and timm's both have these pieces under different names; other towers (ResNets,
rotary ViTs, convolutional hybrids) keep their visual side frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

_TOLERANCE = 1e-4  # of features that are of the order of one


@dataclass(frozen=True)
class FeedForward:
    """The three steps of a block's FFN."""

    up: nn.Linear
    activation: nn.Module
    down: nn.Linear


@runtime_checkable
class Tower(Protocol):
    """What the visual tuner needs of a ViT. Tokens: class token and registers, then patches."""

    depth: int  # blocks
    width: int
    grid: tuple[int, int]  # of patches, rows and columns
    leading: int  # tokens in front of the patches
    pools_class_token: bool  # features depend on nothing but the first token of the last block

    def embed(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens that the first block gets."""
        ...

    def attend(
        self, block: int, tokens: Float[Tensor, "batch tokens width"], first_only: bool = False
    ) -> Float[Tensor, "batch queries width"]:
        """Return tokens after the block's attention and its skip; or only the first of them."""
        ...

    def before_ffn(
        self, block: int, tokens: Float[Tensor, "batch queries width"]
    ) -> Float[Tensor, "batch queries width"]:
        """Return the normalised tokens that the block's FFN gets."""
        ...

    def ffn(self, block: int) -> FeedForward | None:
        """Return the block's FFN; None where it is not two linear layers."""
        ...

    def feed(
        self,
        block: int,
        tokens: Float[Tensor, "batch queries width"],
        update: Float[Tensor, "batch queries width"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Return tokens after the block's FFN, with `update` added to its output, and its skip."""
        ...

    def pool(self, tokens: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch dim"]:
        """Return features, not normalised."""
        ...


class OpenClipTower:
    """open_clip's `VisionTransformer`."""

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._blocks: Sequence[Any] = visual.transformer.resblocks
        self.depth = len(self._blocks)
        self.width = int(visual.conv1.out_channels)
        self.grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        self.leading = 1
        self.pools_class_token = visual.attn_pool is None and visual.pool_type == "tok"

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        return self._visual._embeds(images)  # type: ignore[no-any-return]

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        own = self._blocks[block]
        normalised = own.ln_1(tokens)
        if first_only:
            attended = own.attn(normalised[:, :1], normalised, normalised, need_weights=False)[0]
            return tokens[:, :1] + own.ls_1(attended)  # type: ignore[no-any-return]
        return tokens + own.ls_1(own.attention(q_x=normalised))  # type: ignore[no-any-return]

    def before_ffn(self, block: int, tokens: Tensor) -> Tensor:  # noqa: D102
        return self._blocks[block].ln_2(tokens)  # type: ignore[no-any-return]

    def ffn(self, block: int) -> FeedForward | None:  # noqa: D102
        mlp = self._blocks[block].mlp
        return _feed_forward(mlp.c_fc, mlp.gelu, mlp.c_proj)

    def feed(self, block: int, tokens: Tensor, update: Tensor | None = None) -> Tensor:  # noqa: D102
        own = self._blocks[block]
        output = own.mlp(own.ln_2(tokens))
        return tokens + own.ls_2(output if update is None else output + update)  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:  # noqa: D102
        pooled, _ = self._visual._pool(tokens)
        return pooled if self._visual.proj is None else pooled @ self._visual.proj  # type: ignore[no-any-return]


class TimmTower:
    """timm's `VisionTransformer` inside open_clip's `TimmModel`."""

    def __init__(self, visual: Any) -> None:
        self._visual, self._trunk = visual, visual.trunk
        self._blocks: Sequence[Any] = self._trunk.blocks
        self.depth = len(self._blocks)
        self.width = int(self._trunk.embed_dim)
        rows, columns = self._trunk.patch_embed.grid_size
        self.grid = (int(rows), int(columns))
        self.leading = int(self._trunk.num_prefix_tokens)
        self.pools_class_token = (
            self._trunk.attn_pool is None
            and self._trunk.global_pool == "token"
            and bool(self._trunk.has_class_token)
            and not hasattr(self._trunk, "dist_token")  # distilled ones read it as well
        )

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        trunk = self._trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))  # type: ignore[no-any-return]

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        own = self._blocks[block]
        attended = tokens + own.drop_path1(own.ls1(own.attn(own.norm1(tokens))))
        return attended[:, :1] if first_only else attended  # type: ignore[no-any-return]

    def before_ffn(self, block: int, tokens: Tensor) -> Tensor:  # noqa: D102
        return self._blocks[block].norm2(tokens)  # type: ignore[no-any-return]

    def ffn(self, block: int) -> FeedForward | None:  # noqa: D102
        mlp = self._blocks[block].mlp
        if not isinstance(getattr(mlp, "norm", None), nn.Identity):
            return None
        return _feed_forward(*(getattr(mlp, name, None) for name in ("fc1", "act", "fc2")))

    def feed(self, block: int, tokens: Tensor, update: Tensor | None = None) -> Tensor:  # noqa: D102
        own = self._blocks[block]
        output = own.mlp(own.norm2(tokens))
        output = output if update is None else output + update
        return tokens + own.drop_path2(own.ls2(output))  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:  # noqa: D102
        trunk = self._trunk
        return self._visual.head(trunk.forward_head(trunk.norm(tokens)))  # type: ignore[no-any-return]


def _feed_forward(up: Any, activation: Any, down: Any) -> FeedForward | None:
    linear = isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    if not linear or up.out_features != down.in_features:  # a gated one halves them between
        return None
    return FeedForward(up, activation, down)


@torch.no_grad()
def open_tower(visual: nn.Module, size: tuple[int, int]) -> Tower | None:
    """Return the tower in pieces, or None where its tokens cannot be reached.

    Whether the pieces are all there is to it is found out, not assumed: on random pixels they must
    give what the tower itself gives.

    Args:
        visual: `model.visual` of an open_clip model.
        size: height and width of its images, in pixels.
    """
    parameter = next(visual.parameters())
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(parameter)
    expected = visual(pixels)
    expected = expected[0] if isinstance(expected, tuple) else expected  # CoCa: tokens as well
    for kind in (OpenClipTower, TimmTower):
        try:
            tower: Tower = kind(visual)
            tokens = tower.embed(pixels)
            for block in range(tower.depth):
                tokens = tower.feed(block, tower.attend(block, tokens))
            whole = tokens.shape[1] == tower.leading + tower.grid[0] * tower.grid[1]
            if whole and torch.allclose(tower.pool(tokens), expected, atol=_TOLERANCE):
                return tower
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue  # another architecture
    return None
