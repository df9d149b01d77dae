"""Deep visual prompts: free tokens in the last blocks of the ViT."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart


class VisualPrompts(VisualPart):
    """Free tokens in front of the patches, new in each of the last blocks.

    The usual place is the first blocks; in the last ones they leave the cached tokens usable, and
    a step cheap (ours).
    """

    starts_frozen = False

    def __init__(self, tower: Tower, depth: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = range(max(0, tower.depth - depth), tower.depth)
        self._leading = tower.leading
        self._removed = 0 if tower.pools_class_token else count
        start = 0.02 * torch.randn(len(self.blocks), count, tower.width, generator=generator)
        self.vectors = nn.Parameter(start)
        self.keeps_up_to = self.blocks.start - 1

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "VisualPrompts":
        """Return `visual.prompt_tokens` prompts in each of `visual.prompt_depth` blocks."""
        visual = context.config.visual
        return cls(tower, visual.prompt_depth, visual.prompt_tokens, context.generator)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have visual prompts; None where it can."""
        if not tower.has_tokens:
            return "the visual tower has feature maps, not tokens"
        return None if tower.takes_prompts else "the visual tower rotates the image's tokens alone"

    def before_attention(
        self, block: int, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch more width"]:
        """Put this block's prompts behind the tower's leading tokens, in place of earlier ones."""
        if block not in self.blocks:
            return tokens
        place = block - self.blocks.start
        prompts = self.vectors[place].expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        behind = self._leading + (self.vectors.shape[1] if place else 0)
        return torch.cat([tokens[:, : self._leading], prompts, tokens[:, behind:]], dim=1)

    def before_pooling(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch fewer width"]:
        """Remove the prompts, which are no part of the image, before patches are pooled."""
        if not self._removed:
            return tokens
        behind = self._leading + self._removed
        return torch.cat([tokens[:, : self._leading], tokens[:, behind:]], dim=1)
