"""Accuracy and calibration of predicted probabilities (numpy, no loops over images).

`probabilities` is (images, classes) with rows that sum to 1, of any float precision and never
copied as a whole; `labels` is (images,) of column indices; shares are in 0-1. All functions raise
ValueError for labels that do not fit; only `all_metrics` checks the probabilities as well.

Sources: ECE with equal-width bins, Guo et al. 2017 (arXiv 1706.04599); adaptive ECE with equal-mass
bins, Nguyen & O'Connor 2015 (1508.05154); classwise ECE, Kull et al. 2019 (1910.12656); AURC,
Geifman et al. 2018 (1805.08206).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.probabilities import (
    Floats,
    Ints,
    Probabilities,
    require_both,
    require_columns,
    require_labels,
)
from capt_deploy.metrics.reliability import bin_of, edges, top_labels

_BLOCK = 1 << 17  # probabilities held in float64 at a time: 1 MiB, which fits into a cache


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Return row-wise probabilities of (images, classes) logits, in float64."""
    probabilities = logits.astype(np.float64)  # changed in place: many classes are large arrays
    probabilities -= probabilities.max(axis=1, keepdims=True)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def accuracy(probabilities: Probabilities, labels: Ints) -> float:
    """Return the share of images whose most probable class is their label."""
    return top_labels(probabilities, labels).accuracy()


def expected_calibration_error(probabilities: Probabilities, labels: Ints, bins: int = 15) -> float:
    """Return the mean |accuracy − confidence| over equal-width bins of the top confidence."""
    return top_labels(probabilities, labels).ece(bins)


def classwise_calibration_error(
    probabilities: Probabilities, labels: Ints, bins: int = 15
) -> float:
    """Return the calibration error of every class's probability, averaged over classes."""
    return float(class_gaps(probabilities, labels, bins).sum() / probabilities.size)


def class_gaps(probabilities: Probabilities, labels: Ints, bins: int) -> Floats:
    """Return |images of the class − summed probability| of every class and bin, (classes, bins).

    With many classes nearly all probabilities are in the first bin. That one is summed by columns;
    only the few others are looked up.
    """
    require_labels(probabilities, labels)
    second_edge = edges(bins)[1]
    images, classes = probabilities.shape
    cells = classes * bins
    confidence = np.zeros(cells)
    step = max(_BLOCK // classes, bins)  # never fewer numbers than there are cells to count in
    for start in range(0, images, step):
        block = np.array(probabilities[start : start + step], np.float64, order="C").ravel()
        above = np.flatnonzero(block >= second_edge)
        values = block[above]
        block[above] = 0
        cell = above % classes * bins + bin_of(values, bins)
        confidence += np.bincount(cell, values, cells)
        confidence[::bins] += block.reshape(-1, classes).sum(axis=0)
    label_bins = bin_of(probabilities[np.arange(images), labels], bins)
    right = np.bincount(labels.astype(np.int64) * bins + label_bins, minlength=cells)
    return np.abs(right.astype(np.float64) - confidence).reshape(classes, bins)


def brier(probabilities: Probabilities, labels: Ints) -> float:
    """Return the mean squared distance to the one-hot label, summed over classes (0-2)."""
    squares = np.einsum("ij,ij->i", probabilities, probabilities, dtype=np.float64)
    distances = squares - 2 * _of_labels(probabilities, labels) + 1
    return float(np.maximum(distances, 0).mean())  # rounding may go below 0 by a few 1e-16


def negative_log_likelihood(probabilities: Probabilities, labels: Ints) -> float:
    """Return the mean of −log p(label), in nats; probability 0 counts as the smallest float."""
    likely = np.maximum(_of_labels(probabilities, labels), np.finfo(np.float64).tiny)
    return float((-np.log(likely)).mean())


def _of_labels(probabilities: Probabilities, labels: Ints) -> Floats:
    """Return the probability of each image's label, (images,)."""
    require_labels(probabilities, labels)
    return probabilities[np.arange(len(labels)), labels].astype(np.float64)


def all_metrics(probabilities: Probabilities, labels: Ints) -> dict[str, float | int]:
    """Return every metric under the keys of `capt-eval --json`.

    Raises:
        ValueError: no images, shapes that do not match, a label that is no column, probabilities
            that are not finite or not in 0-1, or rows that do not sum to 1.
    """
    require_both(probabilities, labels)
    top = top_labels(probabilities, labels)
    return {
        "accuracy": top.accuracy(),
        "ece_10": top.ece(10),
        "ece_15": top.ece(15),
        "adaptive_ece": top.adaptive_ece(15),
        "classwise_ece": classwise_calibration_error(probabilities, labels),
        "brier": brier(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "aurc": top.aurc(),
        "n": len(labels),
    }


@dataclass(frozen=True)
class Recovery:
    """Errors that tuning repaired among the mined confusions, and predictions that it broke.

    All are numbers of images. The two shares have different denominators, so that neither says much
    without the counts.
    """

    errors: int  # before tuning, in a mined pair
    recovered: int  # of these, right after tuning
    right: int  # before tuning
    broken: int  # of these, wrong after tuning

    @property
    def recovered_share(self) -> float | None:
        """Return the share of the errors in mined pairs right after tuning; None without errors."""
        return self.recovered / self.errors if self.errors else None

    @property
    def broken_share(self) -> float | None:
        """Return the share of the right predictions that tuning broke; None without any."""
        return self.broken / self.right if self.right else None


def confusion_recovery(
    labels: Ints, before: Ints, after: Ints, mined: Iterable[tuple[int, int]], classes: int
) -> Recovery:
    """Compare the predictions of two models for the same images (METHOD 10).

    Args:
        labels: (images,) true classes.
        before: (images,) classes predicted by the zero-shot model.
        after: (images,) classes predicted by the tuned model.
        mined: true classes, each with one that it is known to be mistaken for.
        classes: their number.

    Raises:
        ValueError: a label or prediction that is no class.
    """
    for columns in (labels, before, after):
        if len(labels):
            require_columns(columns, classes)
    right, right_after = before == labels, after == labels
    known = [true * classes + predicted for true, predicted in mined]
    errors = np.isin(labels * classes + before, known) & ~right
    counts = (errors, errors & right_after, right, right & ~right_after)
    return Recovery(*(int(part.sum()) for part in counts))
