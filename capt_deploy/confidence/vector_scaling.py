"""Vector scaling (Guo et al., arXiv 1706.04599): a factor and an offset for each class's logit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating]


@dataclass(frozen=True)
class VectorScaling:
    """z_c becomes a_c·z_c + b_c, before the temperature."""

    scales: tuple[float, ...]  # a_c, one for each class, above 0
    biases: tuple[float, ...]  # b_c

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.biases):
            raise ValueError("vector scaling: expected as many biases as scales")
        if not np.isfinite([*self.scales, *self.biases]).all() or not (self._a > 0).all():
            raise ValueError("vector scaling: expected finite numbers, and scales above 0")

    @property
    def _a(self) -> NDArray[np.float64]:
        return np.array(self.scales, np.float64)

    @property
    def _b(self) -> NDArray[np.float64]:
        return np.array(self.biases, np.float64)

    def applied(self, logits: _Array) -> NDArray[np.float64]:
        """Return scaled logits (images, classes)."""
        return logits * self._a + self._b

    def undone(self, logits: _Array) -> NDArray[np.float64]:
        """Return what `applied` has made these logits of."""
        return (logits - self._b) / self._a

    def chosen(self, places: Sequence[int]) -> "VectorScaling":
        """Return it for the classes at these places; those behind the last one are neutral."""
        own = len(self.scales)
        return VectorScaling(
            tuple(self.scales[place] if place < own else 1.0 for place in places),
            tuple(self.biases[place] if place < own else 0.0 for place in places),
        )
