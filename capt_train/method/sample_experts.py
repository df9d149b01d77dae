"""Sample experts in the last FFN of a ViT, or in the projection of a convolutional tower."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.clip.vision_tower import FeedForward, Tower
from capt_train.method.base import BuildContext, VisualPart, times


class SampleExperts(VisualPart):
    """`FFN(x) ← Σ_e g_e(x)·FFN_e(x)` for the class token of the last block (METHOD 5).

    Each expert is the frozen FFN plus a low-rank update of its two layers that starts at 0. All
    experts are computed for every image, so the graph has no data-dependent control flow.
    """

    def __init__(
        self, ffn: FeedForward, experts: int, rank: int, generator: torch.Generator, block: int = 0
    ) -> None:
        super().__init__()
        self.keeps_up_to = block
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

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> VisualPart:
        """Return `experts.count` experts of rank `experts.rank`."""
        experts, last = context.config.experts, tower.depth - 1
        if not tower.has_tokens:
            sizes = (tower.width, context.zero_shot.shape[1])
            return ProjectionExperts(sizes, experts.count, experts.rank, context.generator, last)
        ffn = tower.ffn(last)
        if ffn is None:
            raise ValueError("the tower has no FFN of two linear layers; see `obstacle`")
        return cls(ffn, experts.count, experts.rank, context.generator, last)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have sample experts; None where it can."""
        if not tower.has_tokens:
            return None
        if not tower.pools_class_token:
            return "the visual tower does not end in a class token"
        if tower.ffn(tower.depth - 1) is None:
            return "the visual tower's FFN is not two linear layers"
        return None

    def feed_forward(
        self,
        tower: Tower,
        block: int,
        tokens: Float[Tensor, "batch tokens width"],
        strength: Tensor | None,
    ) -> tuple[Float[Tensor, "batch tokens width"] | None, Float[Tensor, "batch experts"] | None]:
        """Return the experts' update of the class token in the last block, and their gates."""
        ffn = tower.ffn(block) if block == self.keeps_up_to else None
        if ffn is None:
            return None, None
        first = tower.before_ffn(block, tokens[:, 0])
        update, gates = self(ffn, first, strength)
        return functional.pad(update[:, None], (0, 0, 0, tokens.shape[1] - 1)), gates

    def forward(
        self,
        ffn: FeedForward,
        tokens: Float[Tensor, "batch width"],
        strength: Float[Tensor, ""] | None,
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch experts"]]:
        """Return the update of the frozen FFN's output, and the gates.

        `Σ_e g_e·(FFN_e − FFN)` equals `Σ_e g_e·FFN_e − FFN`, because the gates sum to 1. It is
        exactly 0 as long as the updates are: frozen and tuned values go through one call of the
        activation, whose rounding depends on the memory layout, and are subtracted before the
        second layer, whose rounding depends on the shape.

        Args:
            ffn: the frozen one.
            tokens: normalised class tokens.
            strength: κ; None where it is folded.
        """
        gates = self.router(tokens).softmax(dim=-1)
        inner = ffn.up(tokens)
        low = torch.einsum("bw,ewr->ber", tokens, self.first_down)
        update = torch.einsum("ber,erh->beh", low, self.first_up)
        tuned = inner[:, None] + times(strength, update)
        both = ffn.activation(torch.cat([inner[:, None], tuned], dim=1))
        frozen, hidden = both[:, :1], both[:, 1:]
        low = torch.einsum("beh,ehr->ber", hidden, self.second_down)
        update = torch.einsum("ber,erw->bew", low, self.second_up)
        moved = functional.linear(hidden - frozen, ffn.down.weight)
        return (gates[:, :, None] * (moved + times(strength, update))).sum(dim=1), gates

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ into the updates."""
        self.first_up.data *= strength
        self.second_up.data *= strength

    def layers_read(self, tower: Tower) -> tuple[nn.Module, ...]:
        """Return the two layers of the frozen FFN."""
        ffn = tower.ffn(self.keeps_up_to)
        return () if ffn is None else (ffn.up, ffn.down)


class ProjectionExperts(VisualPart):
    """`f ← f + Σ_e g_e(x)·U_e·D_e·LN(x)` on the pooled features x of a convolutional tower (ours).

    The counterpart of `SampleExperts` where there is no class token: each expert is a low-rank
    update of the projection behind the pooling that starts at 0.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        experts: int,
        rank: int,
        generator: torch.Generator,
        block: int = 0,
    ) -> None:
        """Build the experts of a projection.

        Args:
            sizes: number of pooled features, and of features behind the projection.
            experts: number of experts.
            rank: of their updates.
            generator: draws D.
            block: number of the tower's last block.
        """
        super().__init__()
        self.keeps_up_to = block
        width, dim = sizes
        start = torch.randn(experts, width, rank, generator=generator) / width**0.5
        self.down = nn.Parameter(start)
        self.up = nn.Parameter(torch.zeros(experts, rank, dim))
        self.router = nn.Linear(width, experts)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def feed_forward(
        self,
        tower: Tower,
        block: int,
        tokens: Float[Tensor, "batch tokens width"],
        strength: Tensor | None,
    ) -> tuple[Float[Tensor, "batch tokens dim"] | None, Float[Tensor, "batch experts"] | None]:
        """Return the experts' update of the projected features, and their gates."""
        if block != self.keeps_up_to:
            return None, None
        pooled = tower.before_ffn(block, tokens[:, 0])
        gates = self.router(pooled).softmax(dim=-1)
        low = torch.einsum("bw,ewr->ber", pooled, self.down)
        update = times(strength, torch.einsum("ber,erd->bed", low, self.up))
        return (gates[:, :, None] * update).sum(dim=1, keepdim=True), gates

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ into the updates."""
        self.up.data *= strength
