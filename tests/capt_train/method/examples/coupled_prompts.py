"""Prompts in both towers, coupled as in MaPLe (arXiv 2210.03117): visual tokens from text ones."""

import torch
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart


class CoupledPrompts(VisualPart):
    """Tokens in the last block, each a linear map of a context vector of the text prompt."""

    starts_frozen = False

    def __init__(self, tower: Tower, context: nn.Parameter) -> None:
        super().__init__()
        self._leading, self._block = tower.leading, tower.depth - 1
        self.keeps_up_to = self._block - 1
        self._context = (context,)  # trained by the text side; in a tuple it is no parameter here
        self.coupling = nn.Linear(context.shape[-1], tower.width)
        self._folded: Tensor | None = None

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "CoupledPrompts":
        """Return the part before the first step; it needs a prompt beside it."""
        return cls(tower, context.prompts[0].context)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have it."""
        return None if tower.pools_class_token else "the visual tower pools patches"

    def before_attention(self, block: int, tokens: Tensor) -> Tensor:
        """Put the coupled tokens behind the leading ones."""
        if block != self._block:
            return tokens
        vectors = self.coupling(self._context[0]) if self._folded is None else self._folded
        rows = vectors.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([tokens[:, : self._leading], rows, tokens[:, self._leading :]], dim=1)

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Replace the coupling by the tokens that it gives."""
        self._folded = self.coupling(self._context[0]).detach()
