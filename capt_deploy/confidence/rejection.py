"""Rejection: a confidence above which predictions are right as often as is required.

Selective classification with a promise (Geifman & El-Yaniv, arXiv 1705.08500). The threshold is
found by tests in a fixed sequence, as in Learn then Test (Angelopoulos et al., 2110.01052): from
the most confident images downwards, until the first test fails. Each test may use the full level:
too much is promised only if the first threshold that is too low passes its test, which happens
with a probability of at most 1 − level.

The sequence is fixed before it is known which images are right: the k most confident images, for
every fiftieth of them, from a tenth of all on, or from where a test can pass at all. An earlier
start would often end at once, by one unlucky image. The threshold of a step lies at the k-th
confidence; given that, the images above it are independent draws from all those above it, and the
test is exact (Clopper & Pearson). Between steps, accuracy is assumed not to fall as the threshold
rises, which is what a confidence is for.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, read_array
from capt_deploy.metrics.probabilities import Floats

_STEPS = 50  # thresholds that are tried
_START = 0.1  # share of the images that the first threshold accepts


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class RejectionTable:
    """The confidences of calibration images, and whether each was classified right."""

    confidence: Floats  # (images,), sorted by the constructor from the highest
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
        """Return the lowest confidence to accept, so that enough accepted predictions are right.

        With probability `level` over the choice of calibration images, at least `accuracy` of all
        images with that confidence or more are classified right. The threshold is the confidence of
        a calibration image, or 0 where everything may be accepted.

        Returns:
            None where no threshold can be promised: too few images, or too many of them wrong.

        Raises:
            ValueError: an accuracy or a level that is not between 0 and 1.
        """
        if not (0 < accuracy < 1 and 0 < level < 1):
            raise ValueError(f"expected shares between 0 and 1, came {accuracy} and {level}")
        images, right = len(self.confidence), np.cumsum(self.correct)
        # With fewer images, the test fails even where all of them are right.
        fewest = max(math.log(1 - level) / math.log(accuracy), _START * images)
        threshold = None
        for accepted in self._steps():
            if accepted < fewest:
                continue
            if _tail(int(right[accepted - 1]), accepted, accuracy) > 1 - level:
                break
            threshold = 0.0 if accepted == images else float(self.confidence[accepted - 1])
        return threshold

    def _steps(self) -> list[int]:
        """Return how many images each threshold that is tried accepts, at last all of them."""
        kept = len(self.confidence) * np.arange(1, _STEPS + 1) // _STEPS
        limits = self.confidence[kept[kept > 0] - 1]
        # Only images above the limit: the image at the limit has placed it. Ties stay together.
        above = np.searchsorted(-self.confidence, -limits, side="left")
        return [*map(int, above), len(self.confidence)]

    def expected_rejection(self, threshold: float) -> float:
        """Return the share of calibration images with a confidence below `threshold`."""
        return float(np.mean(self.confidence < threshold))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the table as arrays of one axis, for a bundle."""
        return {"confidence": self.confidence, "correct": self.correct}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "RejectionTable":
        """Return the table from the result of `arrays`.

        Raises:
            ValueError: an array is missing, or does not belong to a table.
        """
        confidence = read_array(arrays, "confidence", "f")
        return cls(confidence, read_array(arrays, "correct", "b", len(confidence)))


def _tail(right: int, images: int, accuracy: float) -> float:
    """Return the probability that `right` or more of `images` are right at this accuracy."""
    wrong = np.arange(images - right + 1)
    ways = np.append(0.0, np.cumsum(np.log(images - wrong[:-1]) - np.log(wrong[1:])))
    terms = ways + wrong * math.log1p(-accuracy) + (images - wrong) * math.log(accuracy)
    return float(np.exp(terms).sum())
