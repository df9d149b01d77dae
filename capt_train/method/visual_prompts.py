"""Deep visual prompts: free tokens in some blocks of the ViT."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart


class PromptTokens(VisualPart):
    """Tokens in front of the patches, other ones in each of some blocks."""

    starts_frozen = False

    def __init__(self, tower: Tower, blocks: range, count: int) -> None:
        """Remember the places.

        Args:
            tower: the frozen one.
            blocks: that have tokens of their own.
            count: how many.
        """
        super().__init__()
        self.blocks = blocks
        self._leading = tower.leading
        self._removed = 0 if tower.pools_class_token else count
        self.keeps_up_to = blocks.start - 1

    def block_vectors(self, place: int) -> Float[Tensor, "prompts width"]:
        """Return the tokens of a block, given by its place among `blocks`."""
        raise NotImplementedError

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
        vectors = self.block_vectors(place)
        prompts = vectors.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        behind = self._leading + (len(vectors) if place else 0)
        return torch.cat([tokens[:, : self._leading], prompts, tokens[:, behind:]], dim=1)

    def before_pooling(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch fewer width"]:
        """Remove the prompts, which are no part of the image, before patches are pooled."""
        if not self._removed:
            return tokens
        behind = self._leading + self._removed
        return torch.cat([tokens[:, : self._leading], tokens[:, behind:]], dim=1)


class VisualPrompts(PromptTokens):
    """Free tokens, new in each of the last blocks.

    The usual place is the first blocks; in the last ones they leave the cached tokens usable, and
    a step cheap (ours).
    """

    def __init__(self, tower: Tower, blocks: range, count: int, generator: torch.Generator) -> None:
        super().__init__(tower, blocks, count)
        start = 0.02 * torch.randn(len(blocks), count, tower.width, generator=generator)
        self.vectors = nn.Parameter(start)

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "VisualPrompts":
        """Return `visual.prompt_tokens` prompts in each of `visual.prompt_depth` blocks."""
        visual = context.config.visual
        blocks = range(tower.depth)[-visual.prompt_depth :]
        return cls(tower, blocks, visual.prompt_tokens, context.generator)

    def block_vectors(self, place: int) -> Float[Tensor, "prompts width"]:
        """Return the tokens of a block."""
        return self.vectors[place]
