"""Reliability diagrams, risk over coverage, and errors of the most probable class (the top label).

Bins of equal width are [low, high), but the last one holds 1 as well. Their edges are those of
`np.linspace` in float64, whatever the precision of the probabilities: float32's 0.2 is a little
above 0.2.

Images of equal confidence have no order. Where an order is needed, each of them counts as right to
the share of them that is right, so that no figure depends on the order of the images.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from capt_deploy.metrics.probabilities import (
    Floats,
    Ints,
    Probabilities,
    require_both,
    require_labels,
    require_probabilities,
)


def edges(bins: int) -> Floats:
    """Return the edges of bins of equal width, (bins + 1,); raises ValueError without a bin."""
    if bins < 1:
        raise ValueError(f"expected at least one bin, came {bins}")
    return np.linspace(0.0, 1.0, bins + 1)


def bin_of(values: Probabilities, bins: int) -> Ints:
    """Return the bin of each value, in the shape of `values`."""
    exact = values.astype(np.float64, copy=False)
    return np.searchsorted(edges(bins)[1:-1], exact, side="right").astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Reliability:
    """How often predictions of some confidence are right, by bins of equal width."""

    edges: Floats  # (bins + 1,)
    counts: Ints  # (bins,)
    confidence: Floats  # (bins,) mean; NaN where the bin is empty
    accuracy: Floats  # (bins,) likewise


@dataclass(frozen=True, eq=False)
class TopLabels:
    """Confidence and correctness of the most probable class, for at least one image."""

    confidence: Floats  # (images,)
    correct: Floats  # (images,) 1 where that class is the label, else 0

    def accuracy(self) -> float:
        """Return the share of images that are right."""
        return float(self.correct.mean())

    def reliability(self, bins: int) -> Reliability:
        """Return the reliability diagram over bins of equal width."""
        counts, confidence, right = self._sums(bins)
        filled = np.where(counts > 0, counts, np.nan)
        return Reliability(edges(bins), counts, confidence / filled, right / filled)

    def ece(self, bins: int) -> float:
        """Return the mean |accuracy − confidence| over bins of equal width."""
        _, confidence, right = self._sums(bins)
        return float(np.abs(right - confidence).sum() / len(self.correct))

    def _sums(self, bins: int) -> tuple[Ints, Floats, Floats]:
        """Return images, summed confidence and right images of each bin, all (bins,)."""
        inside = bin_of(self.confidence, bins)
        counts = np.bincount(inside, minlength=bins)
        confidence, right = (
            np.bincount(inside, part, bins) for part in (self.confidence, self.correct)
        )
        return counts, confidence.astype(np.float64), right.astype(np.float64)

    def adaptive_ece(self, bins: int) -> float:
        """Return the mean |accuracy − confidence| over bins of equally many images, give or take 1.

        Raises:
            ValueError: no bins.
        """
        edges(bins)
        confidence, expected = self._ranked
        inside = np.arange(len(confidence)) * bins // len(confidence)
        gaps = np.bincount(inside, weights=expected - confidence)
        return float(np.abs(gaps).sum() / len(confidence))

    def risk(self) -> Floats:
        """Return the expected error rate of the 1, 2, … most confident images, (images,)."""
        _, expected = self._ranked
        wrong = np.cumsum(1.0 - expected[::-1])
        return np.asarray(wrong / np.arange(1, len(wrong) + 1))

    def aurc(self) -> float:
        """Return the area under the risk-coverage curve: the mean of `risk`."""
        return float(self.risk().mean())

    @cached_property
    def _ranked(self) -> tuple[Floats, Floats]:
        """Return rising confidences, and how often images of each confidence are right."""
        order = np.argsort(self.confidence)
        confidence = self.confidence[order]
        starts = np.flatnonzero(np.append(True, confidence[1:] != confidence[:-1]))
        sizes = np.diff(starts, append=len(confidence))
        shares = np.add.reduceat(self.correct[order], starts) / sizes
        return confidence, np.repeat(shares, sizes)


def top_labels(probabilities: Probabilities, labels: Ints) -> TopLabels:
    """Return the top label of each image; the first one of classes that are tied.

    Raises:
        ValueError: labels that `require_labels` refuses.
    """
    require_labels(probabilities, labels)
    top = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(top)), top].astype(np.float64)
    return TopLabels(confidence, (top == labels).astype(np.float64))


def reliability(probabilities: Probabilities, labels: Ints, bins: int = 15) -> Reliability:
    """Return the reliability diagram of the top label.

    Args:
        probabilities: (images, classes), rows sum to 1.
        labels: (images,) columns.
        bins: of equal width.

    Raises:
        ValueError: arrays that `require_both` refuses, or no bins.
    """
    require_both(probabilities, labels)
    return top_labels(probabilities, labels).reliability(bins)


def risk_coverage(
    probabilities: Probabilities, labels: Ints, points: int = 200
) -> tuple[Floats, Floats]:
    """Return coverages, rising to 1, and the error rate among that share of most confident images.

    Args:
        probabilities: (images, classes), rows sum to 1.
        labels: (images,) columns.
        points: of the curve, evenly spaced up to whole images; one per image where these are fewer.

    Raises:
        ValueError: arrays that `require_both` refuses, or no points.
    """
    require_both(probabilities, labels)
    if points < 1:
        raise ValueError(f"expected at least one point, came {points}")
    risk = top_labels(probabilities, labels).risk()
    points = min(points, len(risk))
    kept = -(-np.arange(1, points + 1) * len(risk) // points)  # rounded up: never none
    return kept / len(risk), risk[kept - 1]


def calibrated_ece(
    probabilities: Probabilities, bins: int = 15, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return mean and 95 % quantile of the ECE that chance gives a perfectly calibrated model.

    ECE is never negative, and so above 0 for few images whatever the model. Each draw calls every
    image right with the probability of its top label. An ECE below the quantile is no sign that
    anything is wrong (Vaicenavicius et al. 2019, arXiv 1902.06977).

    Raises:
        ValueError: probabilities that `require_probabilities` refuses, no bins or no draws.
    """
    require_probabilities(probabilities)
    if draws < 1:
        raise ValueError(f"expected at least one draw, came {draws}")
    confidence = probabilities.max(axis=1).astype(np.float64)
    inside, random = bin_of(confidence, bins), np.random.default_rng(seed)
    errors = np.empty(draws)
    for number in range(draws):
        right = random.random(len(confidence)) < confidence
        gaps = np.bincount(inside, weights=right - confidence)
        errors[number] = np.abs(gaps).sum() / len(confidence)
    return float(errors.mean()), float(np.quantile(errors, 0.95))
