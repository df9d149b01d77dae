"""Conformal sets: classes that contain the true one with a probability promised beforehand.

Every class of an image gets a score, the lower the better it fits. A set holds the classes whose
score is at most the ceil((n + 1)·coverage)-th smallest score that the true classes of n calibration
images had. Where these images and later ones come from the same distribution, the set holds the
true class with at least that probability, for any n. The scores, with classes ranked by their
probability:

- LAC, 1 − p (Sadinle et al., arXiv 1609.00451), whose sets are the smallest on average;
- APS, p of the class and of all ranked before it (Romano et al., 2006.02544);
- RAPS, the same plus a penalty on late ranks (Angelopoulos et al., 2009.14193).

Probabilities are rounded to float32, as graphs return them, and added up in float64 in order of
rank, so that an image has the same scores alone as in a batch, to the last bit.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, read_array
from capt_deploy.metrics.probabilities import Floats, Ints, Probabilities, require_labels

Method = Literal["lac", "aps", "raps"]
METHODS: tuple[Method, ...] = get_args(Method)
_BLOCK = 1 << 20  # scores computed at once, which bounds the memory
_PENALTY_WEIGHTS = (0.001, 0.01, 0.1, 0.2, 0.5)  # from which the authors of RAPS choose
_CACHED = 64  # limits kept for each table


@dataclass(frozen=True)
class RapsPenalty:
    """The penalty that RAPS adds to a score: weight · max(0, rank − free_ranks)."""

    weight: float = 0.01  # λ
    free_ranks: int = 5  # k_reg; the most probable class has rank 1

    def __post_init__(self) -> None:
        if not (0 <= self.weight < np.inf and self.free_ranks >= 0):
            raise ValueError(f"expected a finite weight and free_ranks of at least 0, came {self}")

    def __call__(self, ranks: Ints) -> Floats:
        """Return the penalty of classes with these ranks, in the shape of `ranks`."""
        return np.asarray(self.weight * np.maximum(ranks - self.free_ranks, 0), np.float64)


DEFAULT_PENALTY = RapsPenalty()


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class ScoreTable:
    """Scores of calibration images, from which sets for any coverage are made."""

    labels: Ints  # (images,)
    correct: NDArray[np.bool_]  # (images,) whether the label is the most probable class
    lac: Floats  # (images,) scores of the labels
    aps: Floats  # (images,) likewise
    raps: Floats  # (images,) likewise
    penalty: RapsPenalty = DEFAULT_PENALTY  # of the RAPS scores

    @classmethod
    def from_probabilities(
        cls, probabilities: Probabilities, labels: Ints, penalty: RapsPenalty = DEFAULT_PENALTY
    ) -> "ScoreTable":
        """Return the table of images that neither training nor the calibration has seen.

        Raises:
            ValueError: no images, labels that do not fit, or probabilities outside 0-1.
        """
        lac, aps, raps = (label_scores(probabilities, labels, m, penalty) for m in METHODS)
        best = _rounded(probabilities).argmax(axis=1)
        return cls(labels.astype(np.int64), best == labels, lac, aps, raps, penalty)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the table as arrays of one axis, for a bundle."""
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
        """Return the table from the result of `arrays`.

        Raises:
            ValueError: an array is missing, or does not belong to a table.
        """
        labels = read_array(arrays, "labels", "i").astype(np.int64)
        if labels.min() < 0:
            raise ValueError(f"labels: expected columns of classes, came {labels.min()}")
        correct = read_array(arrays, "correct", "b", len(labels))
        lac, aps, raps = (read_array(arrays, method, "f", len(labels)) for method in METHODS)
        weight, free_ranks = read_array(arrays, "raps_penalty", "f", 2)
        return cls(labels, correct, lac, aps, raps, RapsPenalty(float(weight), int(free_ranks)))

    def sets(
        self,
        probabilities: Probabilities,
        coverage: float = 0.9,
        method: Method = "lac",
        class_conditional: bool = False,
        allow_empty: bool = False,
    ) -> NDArray[np.bool_]:
        """Return whether each class is in the set of each image, (images, classes).

        The most probable class is in every set, and the quantile allows for it: calibration images
        for which this class is right count as covered, whatever their score. So the promise holds
        as before and sets are not larger than it needs. Where the share of images classified right
        is above `coverage`, all sets have size 1 and more than `coverage` hold the true class.

        Args:
            probabilities: (images, classes); there may be more classes than the table's.
            coverage: share of sets that are to hold the true class, between 0 and 1.
            method: one of `METHODS`.
            class_conditional: promise the coverage for the images of each class, not only for all
                together. A class with too few images in the table is then in every set.
            allow_empty: the papers' own sets, whose share with the true class is `coverage` also
                where the classifier is better than that: some are empty.

        Raises:
            ValueError: an unknown method, other shapes, or fewer classes than the table's.
        """
        _check_request(probabilities, method)
        classes = probabilities.shape[1] if class_conditional else None
        limits = self._cached_limits(coverage, method, classes, allow_empty)
        inside = np.empty(probabilities.shape, np.bool_)
        for rows in _blocks(probabilities):
            block = _rounded(probabilities[rows])
            np.less_equal(class_scores(block, method, self.penalty), limits, out=inside[rows])
            if not allow_empty:
                inside[rows][np.arange(len(block)), block.argmax(axis=1)] = True
        return inside

    @cached_property
    def _cached_limits(self) -> Callable[[float, Method, int | None, bool], Floats]:
        return lru_cache(_CACHED)(self._limits)

    def _limits(
        self, coverage: float, method: Method, classes: int | None, allow_empty: bool
    ) -> Floats:
        """Return the highest score inside a set, (1,) for all classes, else (classes,)."""
        scores: Floats = getattr(self, method)
        if not allow_empty:
            scores = np.where(self.correct, -np.inf, scores)
        labels = np.zeros_like(self.labels) if classes is None else self.labels
        return class_quantiles(scores, labels, classes or 1, coverage)


def choose_penalty(
    probabilities: Probabilities, labels: Ints, coverage: float = 0.9
) -> RapsPenalty:
    """Return the RAPS penalty that makes the sets of these images smallest, by the authors' recipe.

    The ranks that `coverage` of the labels have are free. Where the score table is made from the
    same images, its promise is only nearly kept; the choice is among few, so it costs little.

    Raises:
        ValueError: no images, or labels that do not fit.
    """
    _check_labelled(probabilities, labels)
    ranks, sums = np.empty(len(labels), np.int64), np.empty(len(labels))
    for rows in _blocks(probabilities):
        order, block = _cumulated(probabilities[rows])
        at = (order == labels[rows, np.newaxis]).argmax(axis=1)
        ranks[rows], sums[rows] = at + 1, block[np.arange(len(at)), at]
    classes = np.arange(1, probabilities.shape[1] + 1)
    free_ranks = int(min(quantile(ranks.astype(np.float64), coverage), len(classes)))
    penalties = [RapsPenalty(weight, free_ranks) for weight in _PENALTY_WEIGHTS]
    limits = [quantile(np.where(ranks == 1, -np.inf, sums + p(ranks)), coverage) for p in penalties]
    sizes = np.zeros(len(penalties))
    for rows in _blocks(probabilities):
        block = _cumulated(probabilities[rows])[1][:, 1:]  # the first is in every set
        for index, (penalty, limit) in enumerate(zip(penalties, limits, strict=True)):
            sizes[index] += np.count_nonzero(block + penalty(classes[1:]) <= limit)
    return penalties[int(sizes.argmin())]


def class_scores(
    probabilities: Probabilities, method: Method, penalty: RapsPenalty = DEFAULT_PENALTY
) -> Floats:
    """Return the score of every class, (images, classes).

    Args:
        probabilities: (images, classes). Of equal ones, the earlier column ranks first.
        method: one of `METHODS`.
        penalty: of RAPS.

    Raises:
        ValueError: an unknown method or other shapes.
    """
    _check_request(probabilities, method)
    if method == "lac":
        return np.subtract(1.0, _rounded(probabilities), dtype=np.float64)
    order, sums = _cumulated(probabilities)
    if method == "raps":
        sums += penalty(np.arange(1, sums.shape[1] + 1))
    scores = np.empty_like(sums)
    scores[_rows(order), order] = sums
    return scores


def label_scores(
    probabilities: Probabilities,
    labels: Ints,
    method: Method,
    penalty: RapsPenalty = DEFAULT_PENALTY,
) -> Floats:
    """Return the score of each image's label, (images,); see `class_scores`.

    Raises:
        ValueError: no images, labels that do not fit, or probabilities outside 0-1.
    """
    _check_labelled(probabilities, labels)
    scores = np.empty(len(labels))
    for rows in _blocks(probabilities):
        block = class_scores(probabilities[rows], method, penalty)
        scores[rows] = block[np.arange(len(block)), labels[rows]]
    return scores


def quantile(scores: Floats, coverage: float) -> float:
    """Return the ceil((n + 1)·coverage)-th smallest of n scores; infinity where n is less.

    Raises:
        ValueError: NaN among them, or a coverage that is not between 0 and 1.
    """
    return float(class_quantiles(scores, np.zeros(len(scores), np.int64), 1, coverage)[0])


def fewest_images(coverage: float) -> int:
    """Return how many calibration images a coverage needs; with fewer, sets hold every class."""
    return max(1, math.ceil(coverage / (1 - coverage) - 1e-9))


def class_quantiles(scores: Floats, labels: Ints, classes: int, coverage: float) -> Floats:
    """Return the `quantile` of the scores of each class, (classes,).

    Raises:
        ValueError: as `quantile`, or a label that is no class.
    """
    if not 0 < coverage < 1 or np.isnan(scores).any():
        raise ValueError(f"expected scores without NaN and a coverage in 0-1, came {coverage}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"expected labels of {classes} classes, came {labels.max()}")
    counts = np.bincount(labels, minlength=classes)
    # 100 · 0.07 is 7.000000000000001 in floats, and yet the seventh is meant.
    ranks = np.maximum(np.ceil((counts + 1) * coverage - 1e-9), 1).astype(np.int64)
    ordered = np.append(scores[np.lexsort((scores, labels))], np.inf)
    at = np.cumsum(counts) - counts + ranks - 1
    return np.asarray(ordered[np.where(ranks <= counts, at, len(scores))], np.float64)


def _rounded(probabilities: Probabilities) -> NDArray[np.float32]:
    return probabilities.astype(np.float32, copy=False)


def _cumulated(probabilities: Probabilities) -> tuple[Ints, Floats]:
    """Return columns in order of rank, and the sums of their probabilities up to each."""
    rounded = _rounded(probabilities)
    order = np.argsort(-rounded, axis=1, kind="stable")
    return order, rounded[_rows(order), order].astype(np.float64).cumsum(axis=1)


def _rows(order: Ints) -> Ints:
    # For one image, less than half the time of np.take_along_axis and np.put_along_axis.
    return np.arange(len(order))[:, np.newaxis]


def _blocks(probabilities: Probabilities) -> Iterator[slice]:
    """Return slices of images, few enough that all their scores fit into memory."""
    images, classes = probabilities.shape
    step = max(1, _BLOCK // max(classes, 1))
    return (slice(start, start + step) for start in range(0, images, step))


def _check_request(probabilities: Probabilities, method: Method) -> None:
    if method not in METHODS or probabilities.ndim != 2:
        raise ValueError(
            f"expected a method among {', '.join(METHODS)} and (images, classes) probabilities, "
            f"came {method!r} and {probabilities.shape}"
        )


def _check_labelled(probabilities: Probabilities, labels: Ints) -> None:
    require_labels(probabilities, labels)
    if not (probabilities.min() >= 0 and probabilities.max() <= 1.001):  # NaN fails as well
        raise ValueError("expected probabilities of 0-1, came others")
