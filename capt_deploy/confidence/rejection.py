"""Rejection: the confidence from which on predictions are as often right as is wanted.

Selective classification with a promise (Geifman & El-Yaniv, arXiv 1705.08500): which threshold
keeps it is found by tests in a fixed sequence, as in Learn then Test (Angelopoulos et al.,
2110.01052). They go from the most confident images downwards and end at the first that fails, so
that each may be made at the full level: to promise too much, the first test of a threshold that is
too low would have to pass, and that happens with probability 1 - level at most.

The sequence is fixed before anything is known of what is right: the k most confident images, for
every fiftieth of them, from a tenth of all on, or from where a test can pass at all. An earlier
start would often end at once, by one unlucky image. The threshold of a step lies at the k-th
confidence; given that, the images above it are independent draws from all those above it, and the
test is exact (Clopper & Pearson). From step to step it is taken that accuracy does not fall as the
threshold rises, which is what a confidence is for.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, vector
from capt_deploy.metrics.calibration import Floats

STEPS = 50  # thresholds that are tried
_START = 0.1  # share of the images that the first one lets in


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class RejectionTable:
    """The confidences of calibration images, and whether each was classified right."""

    confidence: Floats  # (images,), here sorted from the highest
    correct: NDArray[np.bool_]  # (images,), in the same order

    def __post_init__(self) -> None:
        confidence, correct = self.confidence, self.correct
        fits = confidence.ndim == 1 and confidence.shape == correct.shape and len(confidence)
        if not fits or not np.isfinite(confidence).all():
            raise ValueError(
                f"expected finite confidences of at least one image, and whether each is right; "
                f"came {confidence.shape} and {correct.shape}"
            )
        order = np.argsort(-confidence, kind="stable")
        object.__setattr__(self, "confidence", confidence[order].astype(np.float64))
        object.__setattr__(self, "correct", correct[order].astype(np.bool_))

    def threshold(self, accuracy: float, level: float = 0.95) -> float | None:
        """Return a confidence to accept from on, so that enough of what is accepted is right.

        With probability `level` over the choice of calibration images, at least `accuracy` of all
        images with that confidence or more are classified right. It is one of the confidences seen
        here, or 0 where everything may be accepted.

        Returns:
            None where the tests, from the most confident tenth of the images on, promise none: too
            few images, or too many of them wrong.

        Raises:
            ValueError: an accuracy or a level that is not between 0 and 1.
        """
        if not (0 < accuracy < 1 and 0 < level < 1):
            raise ValueError(f"expected shares between 0 and 1, came {accuracy} and {level}")
        images, right = len(self.confidence), np.cumsum(self.correct)
        # That many, all of them right, just pass.
        fewest = max(math.log(1 - level) / math.log(accuracy), _START * images)
        found = None
        for accepted in self._steps():
            if accepted < fewest:
                continue
            if _tail(int(right[accepted - 1]), accepted, accuracy) > 1 - level:
                break
            found = 0.0 if accepted == images else float(self.confidence[accepted - 1])
        return found

    def _steps(self) -> list[int]:
        """Return how many images each threshold that is tried lets in, at last all of them."""
        kept = len(self.confidence) * np.arange(1, STEPS + 1) // STEPS
        limits = self.confidence[kept[kept > 0] - 1]
        # All above the limit; its own image is spent on placing it. Ties stay together.
        above = np.searchsorted(-self.confidence, -limits, side="left")
        return [*map(int, above), len(self.confidence)]

    def expected_rejection(self, threshold: float) -> float:
        """Return the share of calibration images with a confidence below `threshold`."""
        return float(np.mean(self.confidence < threshold))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the table as arrays of one axis, as a bundle stores it."""
        return {"confidence": self.confidence, "correct": self.correct}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "RejectionTable":
        """Return the table that `arrays` was called on.

        Raises:
            ValueError: an array is missing, or cannot be one of a table.
        """
        confidence = vector(arrays, "confidence", "f")
        return cls(confidence, vector(arrays, "correct", "b", len(confidence)))


def lower_bound(right: int, images: int, level: float = 0.95) -> float:
    """Return what the true accuracy is at least, with probability `level` (Clopper & Pearson 1934).

    It is the accuracy at which `right` or more of `images` are right with probability 1 - level.

    Raises:
        ValueError: no images, more right than there are, or a level that is not between 0 and 1.
    """
    if not (0 <= right <= images and images > 0 and 0 < level < 1):
        raise ValueError(f"expected right of images and a level, came {right}, {images}, {level}")
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings, down to the precision of floats
        middle = (low + high) / 2
        if _tail(right, images, middle) > 1 - level:
            high = middle
        else:
            low = middle
    return low


def _tail(right: int, images: int, accuracy: float) -> float:
    """Return the probability that `right` or more of `images` are right."""
    wrong = np.arange(images - right + 1)
    ways = np.append(0.0, np.cumsum(np.log(images - wrong[:-1]) - np.log(wrong[1:])))
    terms = ways + wrong * math.log1p(-accuracy) + (images - wrong) * math.log(accuracy)
    return float(np.exp(terms).sum())
