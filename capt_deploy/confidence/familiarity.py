"""Familiarity: how much an image resembles those of the known classes (arXiv 2010.03759)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, read_array
from capt_deploy.metrics.probabilities import Floats

_Array = NDArray[np.floating]


def negative_energy(logits: _Array) -> Floats:
    """Return log Σ exp of each image's logits, (images,): higher for more familiar images.

    Args:
        logits: (images, classes).
    """
    largest = logits.max(axis=1).astype(np.float64)
    return np.asarray(largest + np.log(np.exp(logits - largest[:, np.newaxis]).sum(axis=1)))


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class FamiliarityTable:
    """Scores of images of known classes, which tell how unusual another score is."""

    scores: Floats  # (images,), sorted by the constructor

    def __post_init__(self) -> None:
        scores = self.scores
        if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
            raise ValueError(f"expected scores of at least one image, no NaN; came {scores.shape}")
        object.__setattr__(self, "scores", np.sort(scores.astype(np.float64)))

    def p_value(self, score: _Array | float) -> Floats:
        """Return (1 + calibration images that score at most as high) / (1 + all of them).

        Of images of known classes, a share of at most p has a value of p or less.

        Raises:
            ValueError: NaN, which would count as the most familiar.
        """
        if np.isnan(score).any():
            raise ValueError("expected scores, came NaN")
        at_most = np.searchsorted(self.scores, np.asarray(score, np.float64), "right")
        return np.asarray((1 + at_most) / (1 + len(self.scores)), np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the table as arrays of one axis, for a bundle."""
        return {"scores": self.scores}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "FamiliarityTable":
        """Return the table from the result of `arrays`.

        Raises:
            ValueError: the array is missing, or does not belong to a table.
        """
        return cls(read_array(arrays, "scores", "f"))
