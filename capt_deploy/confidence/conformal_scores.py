"""Conformal sets: classes of which one is right with a probability promised beforehand.

Every class of an image gets a score, the lower the better it fits. A set holds the classes whose
score is at most the ceil((n + 1)·coverage)-th smallest that the true classes of n other images had;
where these images and later ones come from the same world, it holds the true class with at least
that probability, for any n. The scores, with classes ranked by their probability:
LAC, 1 - p (Sadinle et al., arXiv 1609.00451), whose sets are the smallest on average;
APS, p of the class and of all ranked before it (Romano et al., 2006.02544);
RAPS, the same plus a penalty on late ranks (Angelopoulos et al., 2009.14193).

Probabilities are rounded to float32, as graphs return them, and added up in float64, in order of
rank: one image alone has to the last bit the scores that it has among others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.calibration import Floats, Ints

Method = Literal["lac", "aps", "raps"]
METHODS: tuple[Method, ...] = get_args(Method)
_BLOCK = 1 << 20  # scores computed at once, which bounds the memory
Probabilities = NDArray[np.floating]


@dataclass(frozen=True)
class RapsPenalty:
    """What RAPS adds to the score of a class: weight · max(0, rank - free_ranks)."""

    weight: float = 0.01  # λ
    free_ranks: int = 5  # k_reg; the most probable class has rank 1

    def __post_init__(self) -> None:
        if not (0 <= self.weight < np.inf and self.free_ranks >= 0):
            raise ValueError(f"expected a finite weight and free_ranks of at least 0, came {self}")

    def of(self, ranks: Ints) -> Floats:
        """Return it for classes of these ranks."""
        return np.asarray(self.weight * np.maximum(ranks - self.free_ranks, 0), np.float64)


DEFAULT_PENALTY = RapsPenalty()


def class_scores(
    probabilities: Probabilities,
    method: Method,
    penalty: RapsPenalty = DEFAULT_PENALTY,
    uniforms: Floats | None = None,
) -> Floats:
    """Return the score of every class, (images, classes).

    Args:
        probabilities: (images, classes). Of equal ones, the earlier column ranks first.
        method: one of `METHODS`.
        penalty: of RAPS.
        uniforms: (images,) drawn from 0-1, for the randomised APS and RAPS of the papers: that
            share of the class's own probability is taken off. By default nothing is.

    Raises:
        ValueError: an unknown method, other shapes, or uniforms for LAC, which has no such form.
    """
    check_shapes(probabilities, method)
    if method == "lac":
        if uniforms is not None:
            raise ValueError("LAC is never randomised, came uniforms")
        return np.subtract(1.0, rounded(probabilities), dtype=np.float64)
    order, ranked, sums = by_rank(probabilities)
    if uniforms is not None:
        if uniforms.shape != sums.shape[:1]:
            raise ValueError(f"expected {len(sums)} uniforms, came {uniforms.shape}")
        sums -= uniforms[:, np.newaxis] * ranked
    if method == "raps":
        sums += penalty.of(np.arange(1, sums.shape[1] + 1))
    scores = np.empty_like(sums)
    scores[_rows(order), order] = sums
    return scores


def rounded(probabilities: Probabilities) -> NDArray[np.float32]:
    """Return probabilities as graphs return them."""
    return probabilities.astype(np.float32, copy=False)


def by_rank(probabilities: Probabilities) -> tuple[Ints, Floats, Floats]:
    """Return columns, their probabilities and the sums of these, most probable first."""
    own = rounded(probabilities)
    order = np.argsort(-own, axis=1, kind="stable")
    ranked = own[_rows(order), order].astype(np.float64)
    return order, ranked, ranked.cumsum(axis=1)


def _rows(order: Ints) -> Ints:
    # For one image, less than half the time of np.take_along_axis and np.put_along_axis.
    return np.arange(len(order))[:, np.newaxis]


def label_scores(
    probabilities: Probabilities,
    labels: Ints,
    method: Method,
    penalty: RapsPenalty = DEFAULT_PENALTY,
    uniforms: Floats | None = None,
) -> Floats:
    """Return what `class_scores` gives the label of each image, (images,).

    Raises:
        ValueError: as there, or labels that do not fit.
    """
    check(probabilities, labels)
    scores = np.empty(len(labels))
    for rows in blocks(probabilities):
        drawn = None if uniforms is None else uniforms[rows]
        block = class_scores(probabilities[rows], method, penalty, drawn)
        scores[rows] = block[np.arange(len(block)), labels[rows]]
    return scores


def quantile(scores: Floats, coverage: float) -> float:
    """Return the ceil((n + 1)·coverage)-th smallest of n scores; infinity where n is less.

    Raises:
        ValueError: NaN among them, or a coverage that is not between 0 and 1.
    """
    return float(class_quantiles(scores, np.zeros(len(scores), np.int64), 1, coverage)[0])


def class_quantiles(scores: Floats, labels: Ints, classes: int, coverage: float) -> Floats:
    """Return `quantile` of the scores that each label has, (classes,).

    Raises:
        ValueError: as there, or a label that is no class.
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


def blocks(probabilities: Probabilities) -> Iterator[slice]:
    """Return slices of images, small enough for what is computed of them at once."""
    images, classes = probabilities.shape
    step = max(1, _BLOCK // max(classes, 1))
    return (slice(start, start + step) for start in range(0, images, step))


def check_shapes(probabilities: Probabilities, method: Method) -> None:
    """Raise ValueError unless these are (images, classes) and a method."""
    if method not in METHODS or probabilities.ndim != 2:
        raise ValueError(
            f"expected a method among {', '.join(METHODS)} and (images, classes) probabilities, "
            f"came {method!r} and {probabilities.shape}"
        )


def check(probabilities: Probabilities, labels: Ints) -> None:
    """Raise ValueError unless these are probabilities of at least one image, and its label."""
    if probabilities.ndim != 2 or not len(labels) or probabilities.shape[:1] != labels.shape:
        raise ValueError(
            f"expected (images, classes) probabilities and as many labels, at least one; "
            f"came {probabilities.shape} and {labels.shape}"
        )
    if not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise ValueError(
            f"expected labels of {probabilities.shape[1]} classes, "
            f"came {labels.min()} to {labels.max()}"
        )
    if not (probabilities.min() >= 0 and probabilities.max() <= 1.001):  # NaN fails as well
        raise ValueError("expected probabilities of 0-1, came others")
