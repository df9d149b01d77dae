"""The Diff-Manner Adapter of CAPT in the last blocks of the visual tower (METHOD 4)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart, times


class DiffMannerAdapter(nn.Module):
    """`X ← X + α·DWConv3×3(LN(X))` on the patch grid, CAPT (arXiv 2603.02557); starts at 0.

    In a convolutional tower the patches are the positions of a feature map (ours).
    """

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
        """Return the tokens with changed patches; those in front of the patches stay.

        Args:
            tokens: after the attention of a block.
            alpha: strength, one for all images, or (batch, 1, 1); None where it is folded.
        """
        before, patches = tokens[:, : -self._patches], tokens[:, -self._patches :]
        image = self.norm(patches).transpose(1, 2).unflatten(2, self._grid)
        update = self.convolution(image).flatten(2).transpose(1, 2)
        return torch.cat([before, patches + times(alpha, update)], dim=1)

    def fold(self, alpha: Tensor) -> None:
        """Multiply a constant α into the convolution."""
        for parameter in self.convolution.parameters():
            parameter.data *= alpha


class Adapters(VisualPart):
    """An adapter in each of the last blocks whose patches are still read."""

    def __init__(self, tower: Tower, depth: int) -> None:
        super().__init__()
        # Only a later attention, or a pooling over patches, reads the patches.
        behind = tower.depth - 1 if tower.pools_class_token else tower.depth
        blocks = range(max(0, behind - depth), behind)
        shapes = {block: tower.shape(block) for block in blocks}
        adapters = {b: DiffMannerAdapter(shape.width, shape.grid) for b, shape in shapes.items()}
        self._adapters = adapters
        self.blocks = nn.ModuleDict({str(block): adapters[block] for block in blocks})
        self.keeps_up_to = blocks[0]

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "Adapters":
        """Return adapters in `visual.adapter_depth` blocks."""
        return cls(tower, context.config.visual.adapter_depth)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have adapters; None where it can."""
        single = tower.pools_class_token and tower.depth == 1
        return "the visual tower has a single block" if single else None

    def after_attention(
        self, block: int, tokens: Float[Tensor, "batch tokens width"], alpha: Tensor | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens with adapted patches."""
        adapter = self._adapters.get(block)
        return tokens if adapter is None else adapter(tokens, alpha)

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ·α into the convolutions."""
        for adapter in self._adapters.values():
            adapter.fold(alpha)
