"""How well each class is recognised, and which classes are mistaken for each other."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.evaluation.evaluate import (
    ClassPair,
    Evaluation,
    classes_of_worst,
    confusion_counts,
)
from capt_deploy.report.measure import Predictions

Counts = Counter[ClassPair]  # images, by true and predicted class

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


def count_confusions(predictions: Predictions) -> tuple[Counts, Counts | None]:
    """Return how many images of a class the main and the zero-shot model take for which."""

    def counts(probabilities: NDArray[np.floating]) -> Counts:
        return confusion_counts(predictions.labels, probabilities.argmax(axis=1))

    frozen = predictions.zero_shot
    return counts(predictions.main), None if frozen is None else counts(frozen)


def class_rows(evaluation: Evaluation, predictions: Predictions) -> list[ClassRow]:
    """Return a row for each class that has images, the least accurate first."""
    counts, before = count_confusions(predictions)
    images = np.bincount(predictions.labels)
    confidence = np.bincount(predictions.labels, weights=predictions.main.max(axis=1))
    mistakes: dict[int, tuple[int, int]] = {}  # of each class: the most frequent one, how often
    for (true, taken), count in sorted(counts.items()):
        if true != taken and count > mistakes.get(true, (0, 0))[1]:
            mistakes[true] = (taken, count)
    names, rows = evaluation.class_names, []
    for true in np.flatnonzero(images).tolist():
        taken, mistaken = mistakes.get(true, (0, 0))
        rows.append(
            ClassRow(
                names[true],
                bool(evaluation.tuned[true]),
                int(images[true]),
                float(counts[true, true] / images[true]),
                float(confidence[true] / images[true]),
                None if before is None else float(before[true, true] / images[true]),
                names[taken] if mistaken else None,
                mistaken,
            )
        )
    return sorted(rows, key=lambda row: row.accuracy)


def confused_pairs(evaluation: Evaluation, predictions: Predictions) -> list[ConfusedPair]:
    """Return the pairs of classes that the main model confuses most often, worst first."""
    main, before = count_confusions(predictions)
    mined, names = set(evaluation.pairs), evaluation.class_names
    errors = sorted(cell for cell in main if cell[0] != cell[1])
    cells = sorted(errors, key=lambda cell: -main[cell])[:_MOST_PAIRS]
    return [
        ConfusedPair(
            names[true],
            names[taken],
            None if before is None else before[true, taken],
            main[true, taken],
            (true, taken) in mined,
        )
        for true, taken in cells
    ]


def order_by_confusion(counts: Counts, classes: int, most: int) -> list[int]:
    """Return up to `most` classes, ordered so that those often confused stand together.

    From the most confused pair on, the class most confused with either end of the row is put
    there. Where there are more than `most` classes, those of the worst pairs are taken.

    Args:
        counts: of images, by true and predicted class.
        classes: their number.
        most: classes that can be shown, at least 2.
    """
    both = Counter[ClassPair]()
    for (true, predicted), count in counts.items():
        if count and true != predicted:
            both[min(true, predicted), max(true, predicted)] += count
    pairs = sorted(sorted(both), key=lambda pair: -both[pair])
    left = set(range(classes)) if classes <= most else classes_of_worst(pairs, most)

    def confused(pair: ClassPair) -> int:
        return both[min(pair), max(pair)]

    order: list[int] = []
    for start in [column for pair in pairs for column in pair] + sorted(left):
        row = [start] if start in left else []
        left.difference_update(row)
        while row and left:
            ends = [(end, column) for end in (row[0], row[-1]) for column in sorted(left)]
            end, column = max(ends, key=confused)
            if not confused((end, column)):
                break
            row.insert(0 if end == row[0] else len(row), column)
            left.remove(column)
        order += row
    return order
