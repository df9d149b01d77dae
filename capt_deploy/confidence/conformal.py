"""Sets for any coverage, from the scores of calibration images that a bundle stores."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.conformal_scores import (
    DEFAULT_PENALTY,
    METHODS,
    Method,
    Probabilities,
    RapsPenalty,
    blocks,
    by_rank,
    check,
    check_shapes,
    class_quantiles,
    class_scores,
    label_scores,
    quantile,
    rounded,
)
from capt_deploy.confidence.stored_arrays import Arrays, vector
from capt_deploy.metrics.calibration import Floats, Ints

__all__ = [
    "METHODS",
    "Method",
    "RapsPenalty",
    "ScoreTable",
    "choose_penalty",
    "class_quantiles",
    "class_scores",
    "label_scores",
    "quantile",
]

WEIGHTS = (0.001, 0.01, 0.1, 0.2, 0.5)  # that the authors of RAPS choose from
_CACHED = 64  # limits kept of one table


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class ScoreTable:
    """The scores of calibration images, from which sets for any coverage are made."""

    labels: Ints  # (images,)
    correct: NDArray[np.bool_]  # (images,) whether the label is the most probable class
    lac: Floats  # (images,) scores of the labels; the others as well
    aps: Floats
    raps: Floats
    penalty: RapsPenalty = DEFAULT_PENALTY  # that `raps` is made with
    _limits: dict[tuple[Any, ...], Floats] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        probabilities: Probabilities,
        labels: Ints,
        penalty: RapsPenalty = DEFAULT_PENALTY,
    ) -> "ScoreTable":
        """Return the table of images that neither training nor the temperature has seen.

        Raises:
            ValueError: no images, labels that do not fit, or probabilities outside 0-1.
        """
        check(probabilities, labels)
        lac, aps, raps = (label_scores(probabilities, labels, m, penalty) for m in METHODS)
        best = rounded(probabilities).argmax(axis=1)
        return cls(labels.astype(np.int64), best == labels, lac, aps, raps, penalty)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the table as arrays of one axis, as a bundle stores it."""
        return {
            "labels": self.labels,
            "correct": self.correct,
            "lac": self.lac,
            "aps": self.aps,
            "raps": self.raps,
            "raps_penalty": np.array([self.penalty.weight, self.penalty.free_ranks]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "ScoreTable":
        """Return the table that `arrays` was called on.

        Raises:
            ValueError: an array is missing, or cannot be one of a table.
        """
        labels = vector(arrays, "labels", "i").astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"labels: expected columns of classes, came {labels.min()}")
        correct = vector(arrays, "correct", "b", len(labels))
        lac, aps, raps = (vector(arrays, method, "f", len(labels)) for method in METHODS)
        weight, free_ranks = vector(arrays, "raps_penalty", "f", 2)
        return cls(labels, correct, lac, aps, raps, RapsPenalty(float(weight), int(free_ranks)))

    def sets(
        self,
        probabilities: Probabilities,
        coverage: float = 0.9,
        method: Method = "lac",
        class_conditional: bool = False,
        allow_empty: bool = False,
    ) -> NDArray[np.bool_]:
        """Return which classes are in the set of each image, (images, classes).

        The most probable class is in every set. That is told to the quantile: calibration images
        for which this class is right count as covered, whatever their score. So the promise holds
        as before and sets are not larger than it needs, but where more images than `coverage` are
        classified right, more than `coverage` of the sets hold the true class, and all have size 1.

        Args:
            probabilities: (images, classes); there may be more classes than the table's.
            coverage: wanted share of sets that hold the true class, between 0 and 1.
            method: one of `METHODS`.
            class_conditional: promise it for the images of each class, not only for all together.
                A class that the table has too few images of is then in every set.
            allow_empty: the papers' own sets, whose share with the true class is `coverage` also
                where the classifier is better than that: some are empty.

        Raises:
            ValueError: an unknown method, other shapes, or fewer classes than the table's.
        """
        check_shapes(probabilities, method)
        classes = probabilities.shape[1] if class_conditional else None
        limits = self._limit(coverage, method, classes, allow_empty)
        inside = np.empty(probabilities.shape, np.bool_)
        for rows in blocks(probabilities):
            block = rounded(probabilities[rows])
            np.less_equal(class_scores(block, method, self.penalty), limits, out=inside[rows])
            if not allow_empty:
                inside[rows][np.arange(len(block)), block.argmax(axis=1)] = True
        return inside

    def _limit(
        self, coverage: float, method: Method, classes: int | None, allow_empty: bool
    ) -> Floats:
        """Return the highest score inside a set, (1,) for all classes, else (classes,)."""
        key = (coverage, method, classes, allow_empty)
        limits = self._limits.get(key)
        if limits is None:
            scores: Floats = getattr(self, method)
            if not allow_empty:
                scores = np.where(self.correct, -np.inf, scores)
            labels = np.zeros_like(self.labels) if classes is None else self.labels
            limits = class_quantiles(scores, labels, classes or 1, coverage)
            if len(self._limits) >= _CACHED:
                self._limits.clear()
            self._limits[key] = limits
        return limits


def choose_penalty(
    probabilities: Probabilities,
    labels: Ints,
    coverage: float = 0.9,
    weights: tuple[float, ...] = WEIGHTS,
) -> RapsPenalty:
    """Return the penalty of the authors' recipe, with which sets of these images are smallest.

    The ranks that `coverage` of the labels have are free. Where these are the images of the score
    table too, its promise is only nearly kept; the choice is among few, so it takes off little.

    Raises:
        ValueError: no images, or labels that do not fit.
    """
    check(probabilities, labels)
    ranks, sums = np.empty(len(labels), np.int64), np.empty(len(labels))
    for rows in blocks(probabilities):
        order, _, block = by_rank(probabilities[rows])
        at = (order == labels[rows, np.newaxis]).argmax(axis=1)
        ranks[rows], sums[rows] = at + 1, block[np.arange(len(at)), at]
    classes = np.arange(1, probabilities.shape[1] + 1)
    free_ranks = int(min(quantile(ranks.astype(np.float64), coverage), len(classes)))
    penalties = [RapsPenalty(weight, free_ranks) for weight in weights]
    scores = [np.where(ranks == 1, -np.inf, sums + penalty.of(ranks)) for penalty in penalties]
    limits = [quantile(own, coverage) for own in scores]
    sizes = np.zeros(len(weights))
    for rows in blocks(probabilities):
        block = by_rank(probabilities[rows])[2][:, 1:]  # the first is in every set
        for index, (penalty, limit) in enumerate(zip(penalties, limits, strict=True)):
            sizes[index] += np.count_nonzero(block + penalty.of(classes[1:]) <= limit)
    return penalties[int(sizes.argmin())]
