"""How much an image looks like those of the known classes; images of none should score lower.

All scores are larger where the image is more familiar. Sources: energy, Liu et al. (arXiv
2010.03759); the largest logit, Hendrycks et al. (1911.11132); the largest probability, Hendrycks &
Gimpel (1610.02136); the nearest class mean, as Mahalanobis scores do (Lee et al., 1807.03888), but
by the angle, which is what CLIP is trained on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, vector
from capt_deploy.metrics.calibration import Floats

_Array = NDArray[np.floating]


def negative_energy(logits: _Array) -> Floats:
    """Return log Σ exp of each image's logits, (images,), from (images, classes)."""
    largest = logits.max(axis=1).astype(np.float64)
    return np.asarray(largest + np.log(np.exp(logits - largest[:, np.newaxis]).sum(axis=1)))


def max_logit(logits: _Array) -> Floats:
    """Return each image's largest logit, (images,), from (images, classes)."""
    return np.asarray(logits.max(axis=1), np.float64)


def max_probability(probabilities: _Array) -> Floats:
    """Return each image's confidence, (images,), from (images, classes)."""
    return np.asarray(probabilities.max(axis=1), np.float64)


def prototype_similarity(embeddings: _Array, prototypes: _Array) -> Floats:
    """Return the cosine of each image's embedding and the nearest prototype, (images,).

    Args:
        embeddings: (images, dim), of any norm but 0.
        prototypes: (classes, dim), for example the mean of each class's training images; also of
            any norm.
    """
    return np.asarray((_unit(embeddings) @ _unit(prototypes).T).max(axis=1))


def _unit(rows: _Array) -> Floats:
    wide = rows.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def auroc(known: _Array, unknown: _Array) -> float:
    """Return how often a known image scores higher than an unknown one; ties count half.

    Raises:
        ValueError: there are none of either, or NaN among them.
    """
    ordered = _sorted(unknown)
    scores = _sorted(known)
    below = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    return float(below.mean() / (2 * len(ordered)))


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class FamiliarityTable:
    """The scores of images of known classes, which tell how unusual a score is."""

    scores: Floats  # (images,), sorted here

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _sorted(self.scores))

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
        """Return the table as arrays of one axis, as a bundle stores it."""
        return {"scores": self.scores}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "FamiliarityTable":
        """Return the table that `arrays` was called on.

        Raises:
            ValueError: the array is missing, or cannot be one of a table.
        """
        return cls(vector(arrays, "scores", "f"))


def _sorted(scores: _Array) -> Floats:
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(f"expected scores of at least one image, no NaN; came {scores.shape}")
    return np.sort(scores.astype(np.float64))
