"""Compute the factors of distance-aware calibration: less confidence far from the tuned classes.

DAC (arXiv 2402.04655) multiplies an image's logits by the factor of its most probable class,
γ_c = exp(−d) among the mixed rows over exp(−d) among the hand-written embeddings, where d is the
mean Euclidean distance of a class to its nearest tuned ones, all with unit norm. Tuned classes have
γ = 1. See `Calibration.weigh` for how the factors are applied.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.probabilities import Floats

NEIGHBOURS = 5

_Array = NDArray[np.floating]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class TunedTexts:
    """Embeddings of the tuned classes, to which the distance of all others is measured."""

    rows: NDArray[np.float32]  # (tuned, dim), Ŵ_c of any norm
    hand_written: NDArray[np.float32]  # (tuned, dim), t⁰_c

    def factors(self, rows: _Array, hand_written: _Array) -> NDArray[np.float32]:
        """Return γ of classes that were not tuned on, (classes,); 1 where no class was.

        Args:
            rows: (classes, dim), Ŵ_c of any norm.
            hand_written: (classes, dim), t⁰_c.
        """
        if not len(self.rows):
            return np.ones(len(rows), np.float32)
        further = _distance(rows, self.rows) - _distance(hand_written, self.hand_written)
        return np.exp(-further).astype(np.float32)


def _distance(texts: _Array, tuned: _Array) -> Floats:
    """Return the mean distance of each text to its nearest tuned ones, (classes,)."""
    squares = np.maximum(2 - 2 * unit_norm(texts) @ unit_norm(tuned).T, 0)
    count = min(NEIGHBOURS, len(tuned))
    return np.asarray(np.sqrt(np.partition(squares, count - 1, axis=1)[:, :count]).mean(axis=1))


def unit_norm(rows: _Array) -> Floats:
    """Return rows divided by their norm, in float64: small distances lose digits in float32."""
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True))
