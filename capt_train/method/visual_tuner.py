"""What is trained inside the frozen ViT: Diff-Manner Adapter, sample experts, visual prompts."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.clip.vision_tower import FeedForward, Tower


@dataclass(frozen=True)
class Encoded:
    """Images after the tower."""

    embeddings: Float[Tensor, "batch dim"]  # unit norm
    gates: Float[Tensor, "batch experts"] | None  # of the sample experts


class DiffMannerAdapter(nn.Module):
    """`X ← X + α·DWConv3×3(LN(X))` on the patch grid, CAPT (arXiv 2603.02557); starts at 0."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self._grid, self._patches = grid, grid[0] * grid[1]
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.zeros_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], alpha: Float[Tensor, "..."] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens, patches changed, those in front of them untouched.

        Args:
            tokens: after the attention of a block.
            alpha: strength, one for all images, or (batch, 1, 1); None where it is folded.
        """
        before, patches = tokens[:, : -self._patches], tokens[:, -self._patches :]
        image = self.norm(patches).transpose(1, 2).unflatten(2, self._grid)
        update = self.convolution(image).flatten(2).transpose(1, 2)
        return torch.cat([before, patches + _times(alpha, update)], dim=1)

    def fold(self, alpha: Tensor) -> None:
        """Multiply a constant α into the convolution."""
        for parameter in self.convolution.parameters():
            parameter.data *= alpha


class SampleExperts(nn.Module):
    """`FFN(x) ← Σ_e g_e(x)·FFN_e(x)` for the class token of the last block (METHOD 5).

    Each expert is the frozen FFN plus a low-rank update of its two layers that starts at 0. All
    experts are computed for every image, so the graph has no data-dependent control flow.
    """

    def __init__(
        self, ffn: FeedForward, experts: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        width, hidden = ffn.up.in_features, ffn.up.out_features

        def down(size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(experts, size, rank, generator=generator) / size**0.5)

        def up(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(experts, rank, size))

        self.first_down, self.first_up = down(width), up(hidden)
        self.second_down, self.second_up = down(hidden), up(width)
        self.router = nn.Linear(width, experts)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(
        self,
        ffn: FeedForward,
        tokens: Float[Tensor, "batch width"],
        strength: Float[Tensor, ""] | None,
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch experts"]]:
        """Return what is to be added to the frozen FFN's output, and the gates.

        Args:
            ffn: the frozen one.
            tokens: normalised class tokens.
            strength: κ; None where it is folded.

        `Σ_e g_e·(FFN_e − FFN)` equals `Σ_e g_e·FFN_e − FFN`, for the gates sum to 1. It is exactly
        0 as long as the updates are: frozen and tuned values go through one call of the activation,
        whose rounding depends on the memory layout, and differ before the second layer, whose
        rounding depends on the shape.
        """
        gates = self.router(tokens).softmax(dim=-1)
        inner = ffn.up(tokens)
        low = torch.einsum("bw,ewr->ber", tokens, self.first_down)
        update = torch.einsum("ber,erh->beh", low, self.first_up)
        tuned = inner[:, None] + _times(strength, update)
        both = ffn.activation(torch.cat([inner[:, None], tuned], dim=1))
        frozen, hidden = both[:, :1], both[:, 1:]
        low = torch.einsum("beh,ehr->ber", hidden, self.second_down)
        update = torch.einsum("ber,erw->bew", low, self.second_up)
        moved = functional.linear(hidden - frozen, ffn.down.weight)
        return (gates[:, :, None] * (moved + _times(strength, update))).sum(dim=1), gates

    def fold(self, strength: Tensor) -> None:
        """Multiply κ into the updates."""
        self.first_up.data *= strength
        self.second_up.data *= strength


class VisualPrompts(nn.Module):
    """Deep visual prompts: free tokens in front of the patches, new in each of the last blocks.

    The usual place is the first blocks; in the last ones they leave the cached tokens usable, and
    a step cheap (ours).
    """

    def __init__(self, width: int, count: int, blocks: range, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = blocks
        start = 0.02 * torch.randn(len(blocks), count, width, generator=generator)
        self.vectors = nn.Parameter(start)

    def forward(
        self, block: int, tokens: Float[Tensor, "batch tokens width"], leading: int
    ) -> Float[Tensor, "batch more width"]:
        """Put this block's prompts behind the `leading` own tokens, in place of earlier ones."""
        if block not in self.blocks:
            return tokens
        place = block - self.blocks.start
        own = self.vectors[place].expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        behind = leading + (self.vectors.shape[1] if place else 0)
        return torch.cat([tokens[:, :leading], own, tokens[:, behind:]], dim=1)


@dataclass(frozen=True)
class VisualParts:
    """Which parts there are, and how large they are."""

    adapter_blocks: int = 0  # n_a
    experts: int = 0
    expert_rank: int = 8
    prompt_depth: int = 0  # of the last blocks
    prompt_tokens: int = 0


class VisualTuner(nn.Module):
    """All trained parts of the visual side; the frozen tower is passed in, never owned.

    The tower is run up to `start` once per image (`prefix`), whose tokens may be kept; `forward`
    does the rest. With new parts, the result is bit-equal to the frozen tower's.
    """

    alpha: Tensor | None  # at inference: the mean of s·cᵞ over the training images
    strength: Tensor | None  # κ; both are None once they are folded

    def __init__(self, tower: Tower, parts: VisualParts, generator: torch.Generator) -> None:
        super().__init__()
        self._leading = tower.leading
        # Patches are read by nothing but a later attention, or by a pooling over patches.
        behind = tower.depth - 1 if tower.pools_class_token else tower.depth
        blocks = range(max(0, behind - parts.adapter_blocks), behind)
        self.adapters = nn.ModuleDict(
            {str(block): DiffMannerAdapter(tower.width, tower.grid) for block in blocks}
        )
        ffn = tower.ffn(tower.depth - 1) if tower.pools_class_token else None
        self.experts = (
            SampleExperts(ffn, parts.experts, parts.expert_rank, generator)
            if ffn is not None and parts.experts
            else None
        )
        prompted = range(max(0, tower.depth - parts.prompt_depth), tower.depth)
        self.prompts = (
            VisualPrompts(tower.width, parts.prompt_tokens, prompted, generator)
            if prompted
            else None
        )
        # Tokens are kept after an attention: of the first block adapted, before the first prompted.
        first = [tower.depth - 1, *blocks[:1], *(block - 1 for block in prompted[:1])]
        self.start = min(first)
        self.register_buffer("alpha", torch.tensor(1.0))
        self.register_buffer("strength", torch.tensor(1.0), persistent=False)

    def set_constants(self, *, alpha: float | None = None, strength: float | None = None) -> None:
        """Set α or κ."""
        for own, value in ((self.alpha, alpha), (self.strength, strength)):
            assert own is not None  # a folded copy is not tuned any more
            if value is not None:
                own.fill_(value)

    def prefix(
        self, tower: Tower, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after the attention of block `start`, before anything is changed."""
        tokens = tower.embed(images)
        for block in range(self.start):
            tokens = tower.feed(block, tower.attend(block, tokens))
        return tokens if self.start < 0 else tower.attend(self.start, tokens)

    def forward(
        self,
        tower: Tower,
        tokens: Float[Tensor, "batch tokens width"],
        alpha: Float[Tensor, " batch"] | None = None,
        *,
        shortcut: bool = False,
    ) -> Encoded:
        """Run the rest of the tower.

        Args:
            tower: the one this was made for, or a copy of it.
            tokens: from `prefix`.
            alpha: s·cᵞ of each image, in training; otherwise the constant `alpha` holds.
            shortcut: compute only the class token in the last block, where nothing else is read:
                faster, and equal but for rounding.
        """
        own = self.alpha if alpha is None else alpha[:, None, None]
        if own is not None and self.strength is not None:
            own = self.strength * own
        last = tower.depth - 1
        for block in range(max(self.start, 0), last):
            tokens = self._attended(tower, block, tokens)
            tokens = tower.feed(block, self._adapted(block, tokens, own))
        tokens = self._attended(tower, last, tokens, shortcut and tower.pools_class_token)
        tokens = self._adapted(last, tokens, own)
        update, gates = None, None
        if self.experts is not None:
            ffn = tower.ffn(last)
            assert ffn is not None  # else there would be no experts
            first = tower.before_ffn(last, tokens[:, 0])
            added, gates = self.experts(ffn, first, self.strength)
            update = functional.pad(added[:, None], (0, 0, 0, tokens.shape[1] - 1))
        tokens = tower.feed(last, tokens, update)
        if self.prompts is not None and not tower.pools_class_token:
            count = self.prompts.vectors.shape[1]  # no part of the image
            tokens = torch.cat(
                [tokens[:, : self._leading], tokens[:, self._leading + count :]], dim=1
            )
        features = tower.pool(tokens)
        return Encoded(functional.normalize(features.float(), dim=-1), gates)

    def folded(self) -> "VisualTuner":
        """Return a copy for inference, with α and κ multiplied into its weights (METHOD 9)."""
        own = copy.deepcopy(self)
        assert own.alpha is not None and own.strength is not None  # folded once
        for adapter in own.adapters.values():
            assert isinstance(adapter, DiffMannerAdapter)
            adapter.fold(own.alpha * own.strength)
        if own.experts is not None:
            own.experts.fold(own.strength)
        own.alpha = own.strength = None
        return own

    def _attended(
        self, tower: Tower, block: int, tokens: Tensor, first_only: bool = False
    ) -> Tensor:
        if block == self.start:  # cached tokens have been through this attention
            return tokens[:, :1] if first_only else tokens
        if self.prompts is not None:
            tokens = self.prompts(block, tokens, self._leading)
        return tower.attend(block, tokens, first_only)

    def _adapted(self, block: int, tokens: Tensor, alpha: Tensor | None) -> Tensor:
        if str(block) not in self.adapters:
            return tokens
        adapted: Tensor = self.adapters[str(block)](tokens, alpha)
        return adapted


def _times(factor: Tensor | None, values: Tensor) -> Tensor:
    return values if factor is None else factor * values
