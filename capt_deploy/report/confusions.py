"""How well each class is recognised, and which classes are mistaken for each other."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.evaluation.evaluate import Evaluation, confusion_counts
from capt_deploy.report.measure import Predictions

_MOST_PAIRS = 20


@dataclass(frozen=True)
class ClassRow:
    """Figures of one class among all classes."""

    name: str
    tuned: bool
    images: int
    accuracy: float
    confidence: float  # mean of the most probable class
    zero_shot: float | None  # accuracy; None without a zero-shot model
    mistake: str | None  # the class that its images are taken for most often
    mistaken: int  # how many images are


@dataclass(frozen=True)
class ConfusedPair:
    """How many images of one class are taken for another."""

    true: str
    predicted: str
    zero_shot: int | None
    main: int
    mined: bool  # known from the training images


def count_confusions(
    predictions: Predictions,
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return counts (true classes, classes) of the main and the zero-shot model's predictions."""

    def counts(probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
        best = probabilities.argmax(axis=1)
        return confusion_counts(predictions.labels, best, probabilities.shape[1])

    frozen = predictions.zero_shot
    return counts(predictions.main), None if frozen is None else counts(frozen)


def class_rows(evaluation: Evaluation, predictions: Predictions) -> list[ClassRow]:
    """Return a row for each class that has images, the least accurate first."""
    counts, before = count_confusions(predictions)
    images, right = counts.sum(axis=1), np.diag(counts)
    confidence = predictions.main.max(axis=1)
    sums = np.bincount(predictions.labels, weights=confidence, minlength=len(images))
    mistakes = counts - np.diag(right)
    names, rows = evaluation.class_names, []
    for true in np.argsort(right / np.maximum(images, 1), kind="stable").tolist():
        if not images[true]:
            continue
        taken = int(mistakes[true].argmax())
        mistaken = int(mistakes[true, taken])
        rows.append(
            ClassRow(
                names[true],
                bool(evaluation.tuned[true]),
                int(images[true]),
                float(right[true] / images[true]),
                float(sums[true] / images[true]),
                None if before is None else float(before[true, true] / images[true]),
                names[taken] if mistaken else None,
                mistaken,
            )
        )
    return rows


def confused_pairs(evaluation: Evaluation, predictions: Predictions) -> list[ConfusedPair]:
    """Return the pairs of classes that the main model confuses most often, worst first."""
    main, before = count_confusions(predictions)
    np.fill_diagonal(main, 0)
    mined, names = set(evaluation.pairs), evaluation.class_names
    worst = np.argsort(-main, axis=None, kind="stable")[:_MOST_PAIRS]
    cells = [divmod(cell, len(main)) for cell in worst.tolist() if main.flat[cell]]
    return [
        ConfusedPair(
            names[true],
            names[taken],
            None if before is None else int(before[true, taken]),
            int(main[true, taken]),
            (true, taken) in mined,
        )
        for true, taken in cells
    ]


def order_by_confusion(counts: NDArray[np.int64], most: int) -> list[int]:
    """Return up to `most` classes, ordered so that those often confused stand together.

    From the most confused pair on, the class most confused with either end of the row is put
    there. Where there are more than `most` classes, those of the worst pairs are taken.

    Args:
        counts: (classes, classes) of images, `[true, predicted]`.
        most: classes that can be shown, at least 2.
    """
    both = counts + counts.T
    np.fill_diagonal(both, 0)
    first, second = np.nonzero(np.triu(both))
    worst = np.argsort(-both[first, second], kind="stable")
    pairs = [(int(first[index]), int(second[index])) for index in worst]
    left = set(range(len(counts)))
    if len(counts) > most:
        left = set()
        for pair in pairs:
            if len(left.union(pair)) <= most:
                left.update(pair)
    order: list[int] = []
    for start in [column for pair in pairs for column in pair] + sorted(left):
        row = [start] if start in left else []
        left.difference_update(row)
        while row and left:
            ends = [(end, column) for end in (row[0], row[-1]) for column in sorted(left)]
            end, column = max(ends, key=lambda cell: int(both[cell]))
            if not both[end, column]:
                break
            row.insert(0 if end == row[0] else len(row), column)
            left.remove(column)
        order += row
    return order
