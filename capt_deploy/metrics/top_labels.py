"""What can be measured from each image's top confidence and whether its class is right.

Images of equal confidence have no order. Where one is needed it is random, and each of them stands
for what is expected of its place: the share of them that is right. So no figure depends on the
order in which images come.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from capt_deploy.metrics.bins import Sums, require_bins, top_sums
from capt_deploy.metrics.probabilities import Floats, Ints, Probabilities, require_labels


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class TopLabels:
    """The most probable class of each image; at least one image."""

    confidence: Floats  # (images,)
    correct: Floats  # (images,) 1 where that class is the label, else 0

    def __getitem__(self, images: Ints) -> "TopLabels":
        return TopLabels(self.confidence[images], self.correct[images])

    def accuracy(self) -> float:
        """Return the share that is right."""
        return float(self.correct.mean())

    def sums(self, bins: int) -> Sums:
        """Return sums over bins of equal width."""
        return top_sums(self.confidence, self.correct, bins)

    def ece(self, bins: int) -> float:
        """Return the calibration error over bins of equal width."""
        return float(self.sums(bins).gaps().sum() / len(self.correct))

    def adaptive_ece(self, bins: int) -> float:
        """Return the calibration error over bins of equally many images, up to one.

        Of images that are tied over an edge, each bin has its number, as right as all of them are.
        """
        require_bins(bins)
        confidence, expected = self._ranked
        inside = np.arange(len(confidence)) * bins // len(confidence)
        gaps = np.bincount(inside, weights=expected - confidence)
        return float(np.abs(gaps).sum() / len(confidence))

    def risk(self) -> Floats:
        """Return the expected share of wrong among the 1, 2, … most confident images, (images,)."""
        _, expected = self._ranked
        wrong = np.cumsum(1.0 - expected[::-1])
        return np.asarray(wrong / np.arange(1, len(wrong) + 1))

    def aurc(self) -> float:
        """Return the mean of `risk`."""
        return float(self.risk().mean())

    @cached_property
    def _ranked(self) -> tuple[Floats, Floats]:
        """Return confidence, rising, and how often an image of that confidence is right."""
        order = np.argsort(self.confidence)
        confidence = self.confidence[order]
        starts = np.flatnonzero(np.append(True, confidence[1:] != confidence[:-1]))
        sizes = np.diff(starts, append=len(confidence))
        shares = np.add.reduceat(self.correct[order], starts) / sizes
        return confidence, np.repeat(shares, sizes)


def top_labels(probabilities: Probabilities, labels: Ints) -> TopLabels:
    """Return them; of classes that are tied in an image the first.

    Raises:
        ValueError: labels that are not as `require_labels` wants them.
    """
    require_labels(probabilities, labels)
    top = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(top)), top].astype(np.float64)
    return TopLabels(confidence, (top == labels).astype(np.float64))
