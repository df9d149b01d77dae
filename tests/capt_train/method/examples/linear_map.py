"""A linear map of class embeddings, `t̃ = norm(t + tA)`; it starts as the identity."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from capt_train.method.base import BuildContext, ClassTransform


class LinearMap(ClassTransform):
    """One matrix for all classes, so it serves classes that were never seen."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.update = nn.Parameter(torch.zeros(dim, dim))

    @classmethod
    def build(cls, context: BuildContext) -> "LinearMap":
        """Return the map before the first step."""
        return cls(context.zero_shot.shape[1])

    def forward(self, embeddings: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, None]:
        """Return the mapped embeddings."""
        return normalize(embeddings + embeddings @ self.update, dim=-1), None
