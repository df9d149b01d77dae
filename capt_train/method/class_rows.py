"""Class rows and biases of the logits: everything that is known of the classes, folded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ClassRows:
    """Rows Ŵ and biases b of the logits z = scale·f·Ŵᵀ + b."""

    rows: Float[Tensor, "classes dim"]
    biases: Float[Tensor, " classes"]

    @classmethod
    def from_texts(cls, texts: Float[Tensor, "classes dim"]) -> "ClassRows":
        """Return class embeddings as rows, with biases of 0."""
        return cls(texts, texts.new_zeros(len(texts)))

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], scale: float
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of image embeddings."""
        return scale * embeddings.to(self.rows) @ self.rows.T + self.biases

    def cpu(self) -> "ClassRows":
        """Return the same rows without gradients in the memory of the CPU."""
        return ClassRows(self.rows.detach().cpu(), self.biases.detach().cpu())

    def subset(self, places: Sequence[int]) -> "ClassRows":
        """Return the rows and biases of some classes, given by position."""
        return ClassRows(self.rows[list(places)], self.biases[list(places)])


def joined(first: ClassRows, second: ClassRows) -> ClassRows:
    """Return the rows of both, one after the other."""
    rows = torch.cat([first.rows, second.rows.to(first.rows)])
    return ClassRows(rows, torch.cat([first.biases, second.biases.to(first.biases)]))
