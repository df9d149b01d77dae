"""A linear map of class embeddings (METHOD 5b), fitted in one go on cached image embeddings."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.method.base import BuildContext, ClassTransform

IMAGES, CLASSES = "images", "classes"
SIDES = (IMAGES, CLASSES)


class ClassMap(ClassTransform):
    """`t̃ = norm(t + tA)`, METHOD 5b (ours); A starts at zero, so the model starts as it was.

    A function of the class embedding alone: it helps classes without a photo, and it folds.

    `f·(t + tA) = (f + fAᵀ)·t`, so the same A maps images or classes, and only the norm tells them
    apart. While it is fitted, the norm is that of the mapped images or of the mapped classes. The
    first generalises better to new classes, the second fits the tuned ones more closely. What is
    kept is always the map of classes, whose rows cost nothing at inference.
    """

    by_epochs = False

    def __init__(self, dim: int) -> None:
        """Start as the identity on embeddings of `dim` numbers."""
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(dim, dim))

    @classmethod
    def build(cls, context: BuildContext) -> "ClassMap":
        """Return the identity."""
        return cls(context.zero_shot.shape[1])

    def forward(
        self, embeddings: Float[Tensor, "*classes dim"], classes: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "*classes dim"], None]:
        """Return t̃, unit norm like the embeddings."""
        return mapped(embeddings, self.matrix), None


def mapped(
    embeddings: Float[Tensor, "*rows dim"], matrix: Float[Tensor, "dim dim"]
) -> Float[Tensor, "*rows dim"]:
    """Return norm(t + tA)."""
    return functional.normalize(embeddings + embeddings @ matrix, dim=-1)
