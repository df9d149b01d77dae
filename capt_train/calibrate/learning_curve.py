"""Learning curve: the accuracy to expect of more photos, from folds with fewer (ours)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARES = (1 / 3, 2 / 3)  # of a fold's photos of each class, besides all of them
MORE = 10  # photos of a class, whose gain is estimated
_DRAWS = 200  # of the bootstrap
_LEVEL = 0.9  # of the interval
_STEEPEST = 1.0  # b; errors that fall faster than 1/n are chance
_USUAL = 4.0  # photos that the mean error of all classes counts for beside those of a class

Hits = NDArray[np.floating]  # (images,) share of the folds that were right about each


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy on held-out photos by the number of photos tuned on, and what to expect of more.

    The share of mistakes is taken to fall as a·n^−b with n photos a class.
    """

    photos: tuple[float, ...]  # a class, on average; ascending
    accuracy: tuple[float, ...]
    twice: float  # photos a class: twice those of the run
    expected: float  # accuracy with so many
    low: float  # 90 % interval of it, by resampling the held-out photos
    high: float
    gains: tuple[tuple[str, int, float], ...]  # class, its photos, accuracy it gains by ten more

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        gains = [{"class": name, "photos": n, "gain": gain} for name, n, gain in self.gains]
        lists = {"photos": [*self.photos], "accuracy": [*self.accuracy], "gains": gains}
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearningCurve":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        rows = values["gains"]
        return cls(
            tuple(map(float, values["photos"])),
            tuple(map(float, values["accuracy"])),
            float(values["twice"]),
            float(values["expected"]),
            float(values["low"]),
            float(values["high"]),
            tuple((str(row["class"]), int(row["photos"]), float(row["gain"])) for row in rows),
        )


def fit_curve(
    points: Sequence[tuple[float, Hits]],
    labels: NDArray[np.integer],
    counts: NDArray[np.integer],
    class_names: Sequence[str],
    seed: int,
) -> LearningCurve | None:
    """Fit the curve through two or more points; None where there are fewer.

    Args:
        points: photos a class, and which of the same held-out images were right.
        labels: (images,) classes of these images.
        counts: (classes,) photos of each class in the run.
        class_names: of the classes.
        seed: of the bootstrap.
    """
    by_photos = {photos: hits for photos, hits in points if len(hits)}
    if len(by_photos) < 2:
        return None
    photos = np.array(sorted(by_photos))
    hits = np.stack([by_photos[n] for n in photos.tolist()])
    twice = 2 * float(counts.mean())
    draw = np.random.default_rng(seed)
    samples = (draw.integers(0, hits.shape[1], hits.shape[1]) for _ in range(_DRAWS))
    drawn = [_expected(photos, hits[:, rows], twice)[0] for rows in samples]
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    expected, exponent = _expected(photos, hits, twice)
    return LearningCurve(
        tuple(photos.tolist()),
        tuple(hits.mean(axis=1).tolist()),
        twice,
        expected,
        min(float(low), expected),
        max(float(high), expected),
        tuple(_gains(1 - hits[-1], labels, counts, class_names, exponent)),
    )


def _expected(photos: NDArray[Any], hits: NDArray[Any], more: float) -> tuple[float, float]:
    """Return the accuracy to expect of more photos, and b, by least squares of log errors."""
    errors = np.maximum(1 - hits.mean(axis=1), 0.5 / hits.shape[1])
    x, y = np.log(photos), np.log(errors)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    exponent = min(max(-slope, 0.0), _STEEPEST)
    level = float(y.mean() + exponent * x.mean())
    return 1 - min(1.0, math.exp(level - exponent * math.log(more))), exponent


def _gains(
    errors: Hits,
    labels: NDArray[np.integer],
    counts: NDArray[np.integer],
    class_names: Sequence[str],
    exponent: float,
) -> list[tuple[str, int, float]]:
    """Return for each class what ten more photos of it should gain, the largest first.

    Few held-out photos say little about one class, so its error is drawn towards that of all.
    """
    wrong = np.bincount(labels, errors, len(counts)) + _USUAL * errors.mean()
    share = wrong / (np.bincount(labels, minlength=len(counts)) + _USUAL)
    gains = share * (1 - ((counts + MORE) / np.maximum(counts, 1)) ** -exponent)
    order = np.argsort(-gains, kind="stable").tolist()
    return [(class_names[c], int(counts[c]), float(gains[c])) for c in order]


def thinned(
    labels: NDArray[np.integer], share: float, draw: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which of (photos,) to keep: a share of each class, but at least one."""
    kept = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept[draw.permutation(rows)[: max(1, round(share * len(rows)))]] = True
    return kept


def mean_hits(
    images: int, folds: Sequence[tuple[NDArray[np.integer], NDArray[np.bool_]]]
) -> tuple[NDArray[np.integer], Hits]:
    """Return which images were judged, and the share of the folds that were right about each.

    Args:
        images: of all folds.
        folds: places of the judged images, and which were right.
    """
    times, right = np.zeros(images, np.int64), np.zeros(images)
    for places, hits in folds:
        np.add.at(times, places, 1)
        np.add.at(right, places, hits)
    judged = np.flatnonzero(times)
    return judged, right[judged] / times[judged]
