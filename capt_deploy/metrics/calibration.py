"""Accuracy and calibration of predicted probabilities (numpy, no loops over images).

Everywhere `probabilities` is (images, classes) with rows that sum to 1, of any float precision and
never copied as a whole; `labels` is (images,) of column indices; shares are in 0-1. All raise
ValueError for labels that do not fit; only `all_metrics` checks the probabilities as well. Nothing
depends on the order of the images, not even where confidences are tied (see `top_labels`).

Sources: ECE with equal-width bins, Guo et al. 2017 (arXiv 1706.04599); adaptive ECE with equal-mass
bins, Nguyen & O'Connor 2015 (1508.05154); classwise ECE, Kull et al. 2019 (1910.12656); AURC,
Geifman et al. 2018 (1805.08206).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.bins import class_sums
from capt_deploy.metrics.probabilities import Floats as Floats  # noqa: PLC0414 - known by this name
from capt_deploy.metrics.probabilities import Ints as Ints  # noqa: PLC0414
from capt_deploy.metrics.probabilities import (
    Probabilities,
    require_both,
    require_columns,
    require_labels,
)
from capt_deploy.metrics.top_labels import TopLabels, top_labels


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Return row-wise probabilities of (images, classes) logits, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def accuracy(probabilities: Probabilities, labels: Ints) -> float:
    """Return the share of images whose most probable class is their label."""
    return top_labels(probabilities, labels).accuracy()


def expected_calibration_error(probabilities: Probabilities, labels: Ints, bins: int = 15) -> float:
    """Return the mean |accuracy - confidence| over equal-width bins of the top confidence."""
    return top_labels(probabilities, labels).ece(bins)


def adaptive_calibration_error(probabilities: Probabilities, labels: Ints, bins: int = 15) -> float:
    """Return the same over bins that hold equally many images."""
    return top_labels(probabilities, labels).adaptive_ece(bins)


def classwise_calibration_error(
    probabilities: Probabilities, labels: Ints, bins: int = 15
) -> float:
    """Return the calibration error of every class's probability, averaged over classes."""
    require_labels(probabilities, labels)
    return float(class_sums(probabilities, labels, bins).gaps().sum() / probabilities.size)


def brier(probabilities: Probabilities, labels: Ints) -> float:
    """Return the mean squared distance to the one-hot label, summed over classes (0-2)."""
    return float(brier_terms(probabilities, labels).mean())


def brier_terms(probabilities: Probabilities, labels: Ints) -> Floats:
    """Return that distance of each image, (images,)."""
    squares = np.einsum("ij,ij->i", probabilities, probabilities, dtype=np.float64)
    rounded = squares - 2 * _own(probabilities, labels) + 1
    return np.asarray(np.maximum(rounded, 0))  # which it may miss by a few 1e-16


def negative_log_likelihood(probabilities: Probabilities, labels: Ints) -> float:
    """Return the mean of -log p(label), in nats; probability 0 counts as the smallest float."""
    return float(nll_terms(probabilities, labels).mean())


def nll_terms(probabilities: Probabilities, labels: Ints) -> Floats:
    """Return -log p(label) of each image, (images,)."""
    return -np.log(np.maximum(_own(probabilities, labels), np.finfo(np.float64).tiny))


def _own(probabilities: Probabilities, labels: Ints) -> Floats:
    """Return the probability of each image's label."""
    require_labels(probabilities, labels)
    return probabilities[np.arange(len(labels)), labels].astype(np.float64)


def area_under_risk_coverage(probabilities: Probabilities, labels: Ints) -> float:
    """Return the error rate among the most confident images, averaged over all coverages."""
    return top_labels(probabilities, labels).aurc()


def all_metrics(probabilities: Probabilities, labels: Ints) -> dict[str, float | int]:
    """Return every metric under the keys of `capt-eval --json`.

    Raises:
        ValueError: no images, shapes that do not match, a label that is no column, probabilities
            that are not finite or not in 0-1, or rows that do not sum to 1.
    """
    require_both(probabilities, labels)
    figures = combined(
        top_labels(probabilities, labels),
        classwise_calibration_error(probabilities, labels),
        brier_terms(probabilities, labels),
        nll_terms(probabilities, labels),
    )
    return {**figures, "n": len(labels)}


def combined(top: TopLabels, classwise: float, briers: Floats, nlls: Floats) -> dict[str, float]:
    """Return every metric of images that are already reduced to this."""
    return {
        "accuracy": top.accuracy(),
        "ece_10": top.ece(10),
        "ece_15": top.ece(15),
        "adaptive_ece": top.adaptive_ece(15),
        "classwise_ece": classwise,
        "brier": float(briers.mean()),
        "nll": float(nlls.mean()),
        "aurc": top.aurc(),
    }


@dataclass(frozen=True)
class Recovery:
    """What tuning repaired among the mined confusions and what it broke, in images.

    The shares are of different numbers, so that neither says much without the counts.
    """

    errors: int  # before, of a class for one that it was mined with
    recovered: int  # of these, right after
    right: int  # before
    broken: int  # of these, wrong after, whatever for

    @property
    def recovered_share(self) -> float | None:
        """Of the errors in mined pairs; None where there was none."""
        return self.recovered / self.errors if self.errors else None

    @property
    def broken_share(self) -> float | None:
        """Of what was right; None where nothing was."""
        return self.broken / self.right if self.right else None


def confusion_recovery(
    labels: Ints, before: Ints, after: Ints, mined: NDArray[np.bool_]
) -> Recovery:
    """Compare the predictions of two models for the same images (METHOD 10).

    Args:
        labels: (images,) true classes.
        before: (images,) predicted classes, of the zero-shot model.
        after: likewise, of the tuned one.
        mined: (classes, classes) whether a true class, the row, is known to be mistaken for a
            predicted one. The diagonal says nothing.

    Raises:
        ValueError: shapes that do not match, or a class that is none.
    """
    if mined.ndim != 2 or mined.shape[0] != mined.shape[1] or mined.dtype != np.bool_:
        raise ValueError(
            f"expected a boolean (classes, classes) matrix of pairs, "
            f"came {mined.shape} of {mined.dtype}"
        )
    if labels.ndim != 1 or not labels.shape == before.shape == after.shape:
        raise ValueError(
            f"expected one label and two predictions per image, "
            f"came {labels.shape}, {before.shape} and {after.shape}"
        )
    for classes in (labels, before, after):
        if len(labels):
            require_columns(classes, len(mined))
    right, right_after = before == labels, after == labels
    errors = mined[labels, before] & ~right
    counts = (errors, errors & right_after, right, right & ~right_after)
    return Recovery(*(int(part.sum()) for part in counts))
