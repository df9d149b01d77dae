"""Accuracy and calibration of predicted probabilities (numpy, no loops over samples).

Everywhere `probabilities` is (samples, classes) with rows that sum to 1, `labels` is (samples,)
of row indices; shares are in 0-1. Sources: ECE with equal-width bins, Guo et al. 2017
(arXiv 1706.04599); adaptive ECE with equal-mass bins, Nguyen & O'Connor 2015 (1508.05154);
classwise ECE, Kull et al. 2019 (1910.12656); AURC, Geifman et al. 2018 (1805.08206).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Return row-wise probabilities of (samples, classes) logits, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def accuracy(probabilities: Floats, labels: Ints) -> float:
    """Return the share of samples whose most probable class is their label."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def _gap(confidence: Floats, correct: Floats, bins: Ints, count: int) -> float:
    """Sum over bins of |sum(correct) - sum(confidence)|, as a share of the samples."""
    gaps = np.bincount(bins, weights=correct - confidence, minlength=count)
    return float(np.abs(gaps).sum() / len(confidence))


def _equal_width_bins(confidence: Floats, count: int) -> Ints:
    # Bins are [low, high) but for the last, which holds confidence 1 as well.
    edges = np.linspace(0.0, 1.0, count + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="right").astype(np.int64)


def _top(probabilities: Floats, labels: Ints) -> tuple[Floats, Floats]:
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return probabilities.max(axis=1), correct


def expected_calibration_error(probabilities: Floats, labels: Ints, bins: int = 15) -> float:
    """Return the mean |accuracy - confidence| over equal-width bins of the top confidence."""
    confidence, correct = _top(probabilities, labels)
    return _gap(confidence, correct, _equal_width_bins(confidence, bins), bins)


def adaptive_calibration_error(probabilities: Floats, labels: Ints, bins: int = 15) -> float:
    """Return the same over bins that hold equally many samples."""
    confidence, correct = _top(probabilities, labels)
    order = np.argsort(confidence, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return _gap(confidence, correct, rank * bins // len(order), bins)


def classwise_calibration_error(probabilities: Floats, labels: Ints, bins: int = 15) -> float:
    """Return the calibration error of every class's probability, averaged over classes."""
    gaps = [
        _gap(column, (labels == index).astype(np.float64), _equal_width_bins(column, bins), bins)
        for index, column in enumerate(probabilities.T)
    ]
    return float(np.mean(gaps))


def brier(probabilities: Floats, labels: Ints) -> float:
    """Return the mean squared distance to the one-hot label, summed over classes (0-2)."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(np.mean((probabilities**2).sum(axis=1) - 2 * own + 1))


def negative_log_likelihood(probabilities: Floats, labels: Ints) -> float:
    """Return the mean of -log p(label), in nats; probability 0 counts as the smallest float."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean())


def area_under_risk_coverage(probabilities: Floats, labels: Ints) -> float:
    """Return the error rate among the most confident samples, averaged over all coverages."""
    confidence, correct = _top(probabilities, labels)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(1.0 - correct[order])
    return float(np.mean(wrong / np.arange(1, len(wrong) + 1)))


def all_metrics(probabilities: Floats, labels: Ints) -> dict[str, float | int]:
    """Return every metric under the keys of `capt-eval --json`.

    Raises:
        ValueError: no samples, shapes that do not match, a label that is no column, or
            probabilities that are not finite.
    """
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"expected (samples, classes) probabilities and as many labels, at least one; "
            f"came {probabilities.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"expected labels of {probabilities.shape[1]} classes, "
            f"came {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("expected finite probabilities, came NaN or infinity")
    return {
        "accuracy": accuracy(probabilities, labels),
        "ece_10": expected_calibration_error(probabilities, labels, bins=10),
        "ece_15": expected_calibration_error(probabilities, labels, bins=15),
        "adaptive_ece": adaptive_calibration_error(probabilities, labels),
        "classwise_ece": classwise_calibration_error(probabilities, labels),
        "brier": brier(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "aurc": area_under_risk_coverage(probabilities, labels),
        "n": len(labels),
    }
