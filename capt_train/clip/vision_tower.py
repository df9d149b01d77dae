"""A frozen tower in pieces, so that adapters go between attention and FFN and experts into the FFN.

open_clip's own ViTs and timm's have these pieces under different names; see `conv_tower` for towers
of feature maps. Towers of no known kind keep their visual side frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class MapShape:
    """The size of a feature map."""

    width: int  # channels
    grid: tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class FeedForward:
    """The three steps of a block's FFN."""

    up: nn.Linear
    activation: nn.Module
    down: nn.Linear


class Tower:
    """A ViT in pieces. Tokens are the class token and registers, then patches."""

    has_tokens = True  # False for feature maps
    takes_prompts = True  # whether further tokens may join those of the image
    leading: int  # tokens in front of the patches
    pools_class_token: bool  # features depend on nothing but the first token of the last block
    _norm: str  # a block's layers by name: the normalisation before the FFN,
    _scale: str  # the scale of its output,
    _ffn: tuple[str, str, str]  # and its three steps
    _path: str  # name of the blocks in the tower,
    _attention: str  # and of the stacked weights of query, key and value in a block

    def __init__(self, visual: Any, blocks: Any, width: int, grid: Sequence[int]) -> None:
        self._visual, self._blocks = visual, blocks
        self.depth, self.width = len(self._blocks), int(width)
        self.grid = (int(grid[0]), int(grid[1]))  # of patches, rows and columns

    def embed(
        self, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens that enter the first block."""
        raise NotImplementedError

    def shape(self, block: int) -> MapShape:
        """Return the size of the map of patches behind the attention of a block."""
        return MapShape(self.width, self.grid)

    def prefix(
        self, images: Float[Tensor, "batch 3 rows columns"], block: int
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens behind the attention of a block; of -1, those that enter the first."""
        tokens = self.embed(images)
        for earlier in range(block):
            tokens = self.feed(earlier, self.attend(earlier, tokens))
        return tokens if block < 0 else self.attend(block, tokens)

    def attend(
        self, block: int, tokens: Float[Tensor, "batch tokens width"], first_only: bool = False
    ) -> Float[Tensor, "batch queries width"]:
        """Return tokens after the block's attention and its skip connection, or only the first."""
        raise NotImplementedError

    def before_ffn(
        self, block: int, tokens: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """Return the normalised tokens that enter the block's FFN."""
        return getattr(self._blocks[block], self._norm)(tokens)  # type: ignore[no-any-return]

    def ffn(self, block: int) -> FeedForward | None:
        """Return the block's FFN; None where it is not two linear layers."""
        mlp = self._blocks[block].mlp
        up, activation, down = (getattr(mlp, name, None) for name in self._ffn)
        if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
            return None
        if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            return None
        if up.out_features != down.in_features or activation is None:  # a gated one halves them
            return None
        return FeedForward(up, activation, down)

    def feed(
        self,
        block: int,
        tokens: Float[Tensor, "batch queries width"],
        update: Float[Tensor, "batch queries width"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Return tokens after the block's FFN plus `update`, and its skip connection."""
        layers = self._blocks[block]
        output = layers.mlp(self.before_ffn(block, tokens))
        output = output if update is None else output + update
        return tokens + getattr(layers, self._scale)(output)  # type: ignore[no-any-return]

    def pool(self, tokens: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch dim"]:
        """Return features, not normalised."""
        raise NotImplementedError

    def layers(self, block: int) -> dict[str, nn.Module]:
        """Return the layers of a block by their names in the tower."""
        return named_layers(self._visual, (f"{self._path}.{block}",))

    def linear_weights(self, block: int) -> dict[str, int]:
        """Return the names of the weights of a block's attention and FFN.

        Each has the number of matrices that are stacked in it: query, key and value are one weight.
        """
        names = self.attention_weights(block)
        if self.ffn(block) is not None:
            up, _, down = self._ffn
            start = f"{self._path}.{block}"
            names |= {f"{start}.mlp.{layer}.weight": 1 for layer in (up, down)}
        return names

    def attention_weights(self, block: int) -> dict[str, int]:
        """Return those of query, key and value alone."""
        return {f"{self._path}.{block}.{self._attention}": 3}

    def weight(self, name: str) -> nn.Parameter:
        """Return a weight of the tower."""
        return self._visual.get_parameter(name)  # type: ignore[no-any-return]

    def with_updates(self, updates: Mapping[str, Tensor], run: Callable[[], _Result]) -> _Result:
        """Run a function of the tower while updates are added to weights, given by name."""
        if not updates:
            return run()
        weights = {f"visual.{name}": self.weight(name) + values for name, values in updates.items()}
        return functional_call(_Running(self._visual, run), weights, ())  # type: ignore[no-any-return]


class _Running(nn.Module):
    """A function of a tower as a module."""

    def __init__(self, visual: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.visual = visual
        self._run = run

    def forward(self) -> Any:
        return self._run()


def named_layers(visual: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return layers and those inside of them, by name."""
    return {
        f"{name}.{inner}" if inner else name: module
        for name in names
        for inner, module in visual.get_submodule(name).named_modules()
    }


class OpenClipTower(Tower):
    """open_clip's `VisionTransformer`."""

    leading = 1
    _norm, _scale, _ffn = "ln_2", "ls_2", ("c_fc", "gelu", "c_proj")
    _path, _attention = "transformer.resblocks", "attn.in_proj_weight"

    def __init__(self, visual: Any) -> None:
        blocks, width = visual.transformer.resblocks, visual.conv1.out_channels
        super().__init__(visual, blocks, width, visual.grid_size)
        self.pools_class_token = visual.attn_pool is None and visual.pool_type == "tok"

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        return self._visual._embeds(images)  # type: ignore[no-any-return]

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        layers = self._blocks[block]
        normalised = layers.ln_1(tokens)
        if first_only:
            attended = layers.attn(normalised[:, :1], normalised, normalised, need_weights=False)[0]
            return tokens[:, :1] + layers.ls_1(attended)  # type: ignore[no-any-return]
        return tokens + layers.ls_1(layers.attention(q_x=normalised))  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:  # noqa: D102
        pooled, _ = self._visual._pool(tokens)
        return pooled if self._visual.proj is None else pooled @ self._visual.proj  # type: ignore[no-any-return]


class TimmTower(Tower):
    """timm's `VisionTransformer` inside open_clip's `TimmModel`; it never drops paths in eval."""

    _norm, _scale, _ffn = "norm2", "ls2", ("fc1", "act", "fc2")
    _path, _attention = "trunk.blocks", "attn.qkv.weight"

    def __init__(self, visual: Any) -> None:
        trunk = self._trunk = visual.trunk
        super().__init__(visual, trunk.blocks, trunk.embed_dim, trunk.patch_embed.grid_size)
        self.leading = int(trunk.num_prefix_tokens)
        self.pools_class_token = (
            trunk.attn_pool is None
            and trunk.global_pool == "token"
            and bool(trunk.has_class_token)
            and not hasattr(trunk, "dist_token")  # distilled ones read it as well
        )

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        trunk = self._trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))  # type: ignore[no-any-return]

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        layers = self._blocks[block]
        attended = tokens + layers.ls1(layers.attn(layers.norm1(tokens)))
        return attended[:, :1] if first_only else attended  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:  # noqa: D102
        trunk = self._trunk
        return self._visual.head(trunk.forward_head(trunk.norm(tokens)))  # type: ignore[no-any-return]


class EvaTower(TimmTower):
    """timm's `Eva` inside open_clip's `TimmModel`: a ViT with rotary embeddings."""

    def __init__(self, visual: Any) -> None:
        trunk = self._trunk = visual.trunk
        Tower.__init__(self, visual, trunk.blocks, trunk.embed_dim, trunk.patch_embed.grid_size)
        self.leading = int(trunk.num_prefix_tokens)
        self.pools_class_token = trunk.attn_pool is None and trunk.global_pool == "token"
        self.takes_prompts = trunk.rope is None  # which has a rotation for each token of the image

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        tokens, _ = self._trunk._pos_embed(self._trunk.patch_embed(images))
        return self._trunk.norm_pre(tokens)  # type: ignore[no-any-return]

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        layers, rope = self._blocks[block], self._trunk.rope
        rotation = None if rope is None else rope.get_embed()
        attended = layers.attn(layers.norm1(tokens), rope=rotation)
        attended = tokens + _scaled(attended, layers.gamma_1)
        return attended[:, :1] if first_only else attended

    def feed(self, block: int, tokens: Tensor, update: Tensor | None = None) -> Tensor:  # noqa: D102
        layers = self._blocks[block]
        output = layers.mlp(self.before_ffn(block, tokens))
        output = output if update is None else output + update
        return tokens + _scaled(output, layers.gamma_2)

    def attention_weights(self, block: int) -> dict[str, int]:  # noqa: D102
        stacked = super().attention_weights(block)
        if self._blocks[block].attn.qkv is not None:
            return stacked
        (name,) = stacked  # three layers in place of one
        return {name.replace("qkv", f"{x}_proj"): 1 for x in "qkv"}


def _scaled(values: Tensor, gamma: Tensor | None) -> Tensor:
    return values if gamma is None else gamma * values
