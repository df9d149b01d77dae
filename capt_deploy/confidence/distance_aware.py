"""Distance-aware calibration (METHOD 8): less confidence in what tuning has moved far away.

DAC (arXiv 2402.04655) multiplies an image's logits by the factor of its most probable class,
γ_c = exp(−d) among the mixed rows over exp(−d) among the hand-written ones. d is the mean Euclidean
distance of the class's unit-norm row to those of its nearest classes that were tuned on; these have
γ = 1. Factors are positive, so that the most probable class stays the same, and can be undone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 5

_Array = NDArray[np.floating]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class TunedTexts:
    """The classes tuned on, which the distances of others are measured to."""

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


def _distance(texts: _Array, tuned: _Array) -> NDArray[np.float64]:
    """Return the mean distance of each text to its nearest tuned ones, (classes,)."""
    own, others = (_unit(part) for part in (texts, tuned))
    squares = np.maximum(2 - 2 * own @ others.T, 0)
    count = min(NEIGHBOURS, len(others))
    return np.asarray(np.sqrt(np.partition(squares, count - 1, axis=1)[:, :count]).mean(axis=1))


def _unit(texts: _Array) -> NDArray[np.float64]:
    wide = texts.astype(np.float64)  # the distance of two that are nearly alike has few digits left
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def applied(logits: _Array, factors: _Array) -> _Array:
    """Return logits (images, classes) times the factor of each image's most probable class."""
    return np.asarray(logits * factors[logits.argmax(axis=1)][:, np.newaxis])


def undone(logits: _Array, factors: _Array) -> _Array:
    """Return what `applied` has made these logits of."""
    return applied(logits, 1 / factors)


def aligned(logits: _Array, others: _Array, factors: _Array) -> _Array:
    """Return logits with the factors that `others` have, of the same images, for a comparison.

    Where rounding tips an image over to another class, all its logits jump by what the factors of
    the two differ; that is no difference of its own beside that of the class.
    """
    own, wanted = (factors[part.argmax(axis=1)] for part in (logits, others))
    return np.asarray(logits * (wanted / own)[:, np.newaxis])
