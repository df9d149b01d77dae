"""How many probabilities fall into bins of equal width, and how often these are right.

Bins are [low, high) but for the last, which holds 1 as well. The edges are those of `np.linspace`
in float64, whatever the precision of the probabilities: float32's 0.2 is a little above 0.2.
"""

from dataclasses import dataclass

import numpy as np

from capt_deploy.metrics.probabilities import Floats, Ints, Probabilities

_BLOCK = 1 << 17  # probabilities that are held in float64 at a time: 1 MiB, as fits into a cache


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Sums:
    """Sums over each bin: (bins,) of the top label, or (classes, bins)."""

    counts: Ints
    confidence: Floats
    right: Floats

    def gaps(self) -> Floats:
        """Return |right − confidence| of each bin, in images."""
        return np.abs(self.right - self.confidence)


def require_bins(bins: int) -> None:
    """Check that there is a bin; raises ValueError."""
    if bins < 1:
        raise ValueError(f"expected at least one bin, came {bins}")


def edges(bins: int) -> Floats:
    """Return the (bins + 1,) edges; raises ValueError where there is no bin."""
    require_bins(bins)
    return np.linspace(0.0, 1.0, bins + 1)


def bin_of(values: Probabilities, bins: int) -> Ints:
    """Return the bin of each value, in the shape of `values`."""
    wide = values.astype(np.float64, copy=False)
    return np.searchsorted(edges(bins)[1:-1], wide, side="right").astype(np.int64, copy=False)


def top_sums(confidence: Floats, correct: Floats, bins: int) -> Sums:
    """Return the sums over (images,) confidences of the top label and whether it is right, 0/1."""
    inside = bin_of(confidence, bins)
    return Sums(
        np.bincount(inside, minlength=bins),
        *(np.bincount(inside, part, bins).astype(np.float64) for part in (confidence, correct)),
    )


def class_sums(probabilities: Probabilities, labels: Ints, bins: int) -> Sums:
    """Return the sums over all images of every class's probability, (classes, bins).

    A row sums to 1, so that with many classes nearly all of it is in the first bin. That one is
    summed by columns; only the few others are looked up.
    """
    first = edges(bins)[1]
    images, classes = probabilities.shape
    cells = classes * bins
    counts, confidence = np.zeros(cells, np.int64), np.zeros(cells)
    step = max(_BLOCK // classes, bins)  # never fewer numbers than there are cells to count in
    for start in range(0, images, step):
        block = np.array(probabilities[start : start + step], np.float64, order="C").ravel()
        above = np.flatnonzero(block >= first)
        values = block[above]
        block[above] = 0  # what is left is in the first bin
        cell = above % classes * bins + bin_of(values, bins)
        counts += np.bincount(cell, minlength=cells)
        confidence += np.bincount(cell, values, cells)
        confidence[::bins] += block.reshape(-1, classes).sum(axis=0)
    counts[::bins] += images - counts.reshape(classes, bins).sum(axis=1)
    own = labels.astype(np.int64) * bins + bin_of(probabilities[np.arange(images), labels], bins)
    right = np.bincount(own, minlength=cells).astype(np.float64)
    shape = (classes, bins)
    return Sums(counts.reshape(shape), confidence.reshape(shape), right.reshape(shape))
