"""Class rows and biases of the logits, fixed while the visual side is tuned."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ClassRows:
    """Rows Ŵ and biases b of the logits z = scale·f·Ŵᵀ + b."""

    rows: Float[Tensor, "classes dim"]
    biases: Float[Tensor, " classes"]

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], scale: float
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of image embeddings."""
        return scale * embeddings.to(self.rows) @ self.rows.T + self.biases

    def subset(self, places: Sequence[int]) -> "ClassRows":
        """Return the rows and biases of some classes, given by position."""
        return ClassRows(self.rows[list(places)], self.biases[list(places)])
