"""Class rows and biases of the logits: everything that is known of the classes, folded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Outside:
    """How classes without photos stand beside those with photos (ours).

    Logits of tuned classes spread more widely than those of classes known by name alone. One
    temperature for both would leave the latter unsure, and rows would drown them (calibrated
    stacking, arXiv 1605.04253). So `Ŵ_c ← m + γ(Ŵ_c − m)` for a class without photos, m being the
    mean of the tuned classes, and δ is taken off the biases of the tuned ones.
    """

    scale: float = 1.0  # γ
    offset: float = 0.0  # δ, nats

    def texts(
        self, texts: Float[Tensor, "classes dim"], centre: Float[Tensor, " dim"]
    ) -> Float[Tensor, "classes dim"]:
        """Return the rows of classes without photos; `centre` is m."""
        return centre + self.scale * (texts - centre)

    def applied(self, rows: "ClassRows", tuned: Sequence[bool]) -> "ClassRows":
        """Return rows of all classes, as trained, with γ and δ."""
        known = torch.tensor(tuned, device=rows.rows.device)
        centre = rows.rows[known].mean(dim=0)
        texts = torch.where(known[:, None], rows.rows, self.texts(rows.rows, centre))
        return ClassRows(texts, rows.biases - self.offset * known.to(rows.biases))


UNCHANGED = Outside()


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
