"""How the main model and the zero-shot one do on each class, and whom they take for whom.

Everything here is among all classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.calibration import Floats, Ints
from capt_deploy.report.data import Answers, ReportData
from capt_deploy.report.measure import probabilities_among

_MOST_PAIRS = 20


@dataclass(frozen=True, eq=False)
class Joint:
    """Probabilities among all classes, (images, classes)."""

    labels: Ints  # (images,)
    main: Floats
    zero_shot: Floats | None


@dataclass(frozen=True)
class ClassRow:
    """What is measured of one class; None without images, or without a zero-shot model."""

    name: str
    tuned: bool
    images: int
    accuracy: float | None
    confidence: float | None  # mean of the most probable class
    zero_shot: float | None  # accuracy
    mistake: str | None  # what its images are taken for most often
    mistaken: int  # so many images


@dataclass(frozen=True)
class ConfusedPair:
    """How many images of one class are taken for another."""

    true: str
    predicted: str
    zero_shot: int | None
    main: int
    mined: bool


def joint(data: ReportData) -> Joint:
    """Return what both models say of all images among all classes."""
    every = np.arange(len(data.class_names))

    def probabilities(model: Answers) -> Floats:
        return probabilities_among(data.labels, model, every)[0]

    frozen = data.zero_shot
    return Joint(
        data.labels, probabilities(data.main), None if frozen is None else probabilities(frozen)
    )


def confusion_counts(labels: Ints, probabilities: Floats) -> NDArray[np.int64]:
    """Return how many images of each class are taken for each, (true classes, classes)."""
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_rows(data: ReportData, found: Joint) -> list[ClassRow]:
    """Return a row for each class that has images, the worst first."""
    counts = confusion_counts(found.labels, found.main)
    images = counts.sum(axis=1)
    confidence = np.bincount(
        found.labels, weights=found.main.max(axis=1), minlength=len(images)
    ) / np.maximum(images, 1)
    right = np.diag(counts)
    before = None
    if found.zero_shot is not None:
        before = np.diag(confusion_counts(found.labels, found.zero_shot))
    mistakes = counts - np.diag(right)
    taken = mistakes.argmax(axis=1)
    rows = []
    for index in np.argsort(right / np.maximum(images, 1), kind="stable").tolist():
        if not images[index]:
            continue
        mistaken = int(mistakes[index, taken[index]])
        rows.append(
            ClassRow(
                data.class_names[index],
                bool(data.tuned[index]),
                int(images[index]),
                float(right[index] / images[index]),
                float(confidence[index]),
                None if before is None else float(before[index] / images[index]),
                data.class_names[taken[index]] if mistaken else None,
                mistaken,
            )
        )
    return rows


def confused_pairs(data: ReportData, found: Joint) -> list[ConfusedPair]:
    """Return who is taken for whom most often by the main model, worst first."""
    main = confusion_counts(found.labels, found.main)
    before = None
    if found.zero_shot is not None:
        before = confusion_counts(found.labels, found.zero_shot)
    np.fill_diagonal(main, 0)
    mined = set(data.pairs)
    worst = np.argsort(-main, axis=None, kind="stable")[:_MOST_PAIRS]
    cells = [divmod(cell, len(main)) for cell in worst.tolist() if main.flat[cell]]
    return [
        ConfusedPair(
            data.class_names[true],
            data.class_names[taken],
            None if before is None else int(before[true, taken]),
            int(main[true, taken]),
            (true, taken) in mined,
        )
        for true, taken in cells
    ]
