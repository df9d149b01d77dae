"""Data for reliability diagrams, and curves of risk and accuracy over coverage.

`probabilities` is (images, classes) with rows that sum to 1, `labels` (images,) of columns. All
raise ValueError for what `metrics.all_metrics` refuses, and where nothing is asked for: no bins,
points or draws.
"""

from dataclasses import dataclass

import numpy as np

from capt_deploy.metrics.bins import Sums, bin_of, class_sums, edges
from capt_deploy.metrics.probabilities import (
    Floats,
    Ints,
    Probabilities,
    require_both,
    require_probabilities,
)
from capt_deploy.metrics.top_labels import top_labels


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Reliability:
    """How often what is said with some confidence is right, by bins of equal width.

    All but the edges are (bins,), or (classes, bins) where every class is measured on its own.
    """

    edges: Floats  # (bins + 1,)
    counts: Ints
    confidence: Floats  # mean of the bin, NaN where it is empty
    accuracy: Floats  # likewise


def reliability(probabilities: Probabilities, labels: Ints, bins: int = 15) -> Reliability:
    """Return the reliability of the top label."""
    require_both(probabilities, labels)
    return _means(top_labels(probabilities, labels).sums(bins), bins)


def classwise_reliability(
    probabilities: Probabilities, labels: Ints, bins: int = 15
) -> Reliability:
    """Return the reliability of every class's probability, whether it is the top one or not.

    A class's accuracy in a bin is the share of the images there that are of the class.
    """
    require_both(probabilities, labels)
    return _means(class_sums(probabilities, labels, bins), bins)


def _means(sums: Sums, bins: int) -> Reliability:
    full = np.where(sums.counts > 0, sums.counts, np.nan)
    return Reliability(edges(bins), sums.counts, sums.confidence / full, sums.right / full)


def risk_coverage(
    probabilities: Probabilities, labels: Ints, points: int = 200
) -> tuple[Floats, Floats]:
    """Return coverages, rising to 1, and the error rate among that share of most confident images.

    There are `points` of them, evenly spaced up to whole images, or one per image where these are
    fewer. Where a coverage parts images of equal confidence, the rate is the expected one of a
    random choice among them.
    """
    require_both(probabilities, labels)
    if points < 1:
        raise ValueError(f"expected at least one point, came {points}")
    risk = top_labels(probabilities, labels).risk()
    points = min(points, len(risk))
    kept = -(-np.arange(1, points + 1) * len(risk) // points)  # rounded up: never none
    return kept / len(risk), risk[kept - 1]


def accuracy_coverage(
    probabilities: Probabilities, labels: Ints, points: int = 200
) -> tuple[Floats, Floats]:
    """Return the same with the share that is right."""
    coverage, risk = risk_coverage(probabilities, labels, points)
    return coverage, 1 - risk


def calibrated_ece(
    probabilities: Probabilities, bins: int = 15, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return mean and 95 % quantile of the ECE that chance gives a perfectly calibrated model.

    ECE is never negative, and so above 0 for few images whatever the model. Each draw calls every
    image right with the probability of its top label. An ECE below the quantile is no sign that
    anything is wrong (Vaicenavicius et al. 2019, arXiv 1902.06977).
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
