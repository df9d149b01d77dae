"""Accuracy, calibration and confusion of a tuned model, the same for a run and its bundle."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import UNCALIBRATED, Calibration
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.core.errors import ConfigError
from capt_deploy.metrics.calibration import all_metrics, confusion_recovery
from capt_deploy.metrics.intervals import harmonic_mean
from capt_deploy.metrics.probabilities import Floats, Ints

Class = TypeVar("Class", int, str)  # by its column or its name
Report = dict[str, Any]
ClassPair = tuple[int, int]  # columns: the true class, and the class it is mistaken for

SCOPES = ("base", "new", "all")


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Scores:
    """Logits of a model for labelled images, next to those of the zero-shot model."""

    labels: Ints  # (images,) of columns
    # (images, classes), by `Calibration.scale`. Its other steps depend on the classes that an image
    # is measured among; see `among`.
    tuned: NDArray[np.floating]
    # Likewise with a temperature of its own. None where the frozen model is not at hand, as in a
    # bundle whose visual side was tuned.
    zero_shot: NDArray[np.floating] | None
    calibration: Calibration = UNCALIBRATED
    zero_shot_temperature: float = 1.0

    @property
    def uncalibrated(self) -> "Scores":
        """Return the scores of both models as they were before any calibration."""
        frozen = None if self.zero_shot is None else self.zero_shot * self.zero_shot_temperature
        return Scores(self.labels, self.calibration.unscale(self.tuned), frozen)

    @property
    def zero_shot_alone(self) -> "Scores | None":
        """Return the scores of the zero-shot model by itself; None where it is not at hand."""
        if self.zero_shot is None:
            return None
        return Scores(self.labels, self.zero_shot, None, Calibration(self.zero_shot_temperature))

    def rows(self, rows: NDArray[np.int64]) -> "Scores":
        """Return the scores of some images."""
        zero_shot = None if self.zero_shot is None else self.zero_shot[rows]
        return replace(self, labels=self.labels[rows], tuned=self.tuned[rows], zero_shot=zero_shot)

    def among(self, columns: NDArray[np.int64]) -> tuple[Floats, Ints]:
        """Return calibrated probabilities among some classes, and labels of their columns.

        Args:
            columns: the classes, ascending; only images of these classes count.

        Returns:
            Probabilities (images of these classes, these classes) and labels of the same images.
        """
        if len(columns) == self.tuned.shape[1]:  # `columns` are all classes: avoid a copy
            return self.calibration.probabilities(self.calibration.weigh(self.tuned)), self.labels
        rows = np.flatnonzero(np.isin(self.labels, columns))
        calibration = self.calibration.select(columns)
        logits = calibration.weigh(self.tuned[np.ix_(rows, columns)])
        return calibration.probabilities(logits), np.searchsorted(columns, self.labels[rows])


@dataclass(frozen=True)
class SuspectPhoto:
    """A photo that the run has used, and whose label is probably wrong."""

    file: Path
    label: str
    shares: Sequence[tuple[str, float]]  # class and probability by a model that has not seen it


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One or more models scored on the same labelled images."""

    class_names: Sequence[str]
    tuned: Sequence[bool]  # for each class: tuned on (base) or not (new)
    pairs: Sequence[ClassPair]  # confusions mined from the training images
    files: Sequence[Path]  # (images,)
    scores: Mapping[str, Scores]  # by name of the model, the main one first
    skipped: Sequence[tuple[str, str]] = ()  # path of what was left out, and why
    provenance: Mapping[str, Any] = field(default_factory=dict)  # nested, of what JSON can hold
    notes: Sequence[str] = ()  # what a reader has to know before the figures
    decisions: Decisions | None = None  # of the main model, from its held-out images
    suspects: Sequence[SuspectPhoto] = ()  # the most suspect first

    @property
    def main(self) -> Scores:
        """Return the scores of the main model."""
        return next(iter(self.scores.values()))

    def report(self, scope: str | None = None) -> Report:
        """Return the report of `capt-eval` about the main model; see `evaluate`."""
        report = evaluate(self.main, self.class_names, self.tuned, self.pairs, scope)
        return {**report, "skipped": [list(pair) for pair in self.skipped]}


def evaluate(
    scores: Scores,
    class_names: Sequence[str],
    tuned: Sequence[bool],
    pairs: Iterable[ClassPair],
    scope: str | None = None,
) -> Report:
    """Return accuracy, calibration and confusion of both models (METHOD 10).

    `base` are the classes tuned on, `new` all other classes: each is measured on the images and
    columns of these classes, `all` with all columns. A scope without images is None.

    Args:
        scores: of the same images for the tuned and the zero-shot model.
        class_names: one for each column.
        tuned: whether each column was tuned on.
        pairs: the confusions mined from the training images, for recovery and breakage.
        scope: `base`, `new` or `all` to measure only that.

    Raises:
        ConfigError: the scope does not exist here.
    """
    every, is_tuned = np.arange(len(tuned)), np.asarray(tuned, bool)
    columns = {"base": every[is_tuned], "new": every[~is_tuned], "all": every}
    if is_tuned.all():  # nothing is new, so base and all would say the same twice
        columns["base"] = columns["new"]
    report = _measure(scores, columns, scope)
    if scope and report[scope] is None:
        raise ConfigError(f"no images of {scope!r} classes to evaluate; was the run tuned on all?")
    frozen = scores.zero_shot_alone
    report["uncalibrated"] = _measure(scores.uncalibrated, columns, scope)
    base = columns["base"] if len(columns["base"]) else every
    report["confusion"] = _confusion(scores, class_names, base, pairs)
    report["zero_shot"] = report["uncalibrated"]["zero_shot"] = None
    if frozen is not None:
        report["zero_shot"] = _measure(frozen, columns, scope)
        report["uncalibrated"]["zero_shot"] = _measure(frozen.uncalibrated, columns, scope)
    return report


def _measure(scores: Scores, columns: Mapping[str, Ints], scope: str | None) -> Report:
    report: Report = {}
    for name in SCOPES:
        exists = scope in (None, name) and np.isin(scores.labels, columns[name]).any()
        report[name] = all_metrics(*scores.among(columns[name])) if exists else None
    both = report["base"] and report["new"]
    report["harmonic_mean"] = (
        harmonic_mean(report["base"]["accuracy"], report["new"]["accuracy"]) if both else None
    )
    return report


def _confusion(
    scores: Scores, class_names: Sequence[str], columns: Ints, pairs: Iterable[ClassPair]
) -> Report:
    """Return recovery, breakage and the most confused pairs among the classes tuned on.

    `recovered` is the share of the zero-shot model's errors in mined pairs that are right after
    tuning; `broken` the share of its right answers that are wrong after it, in any pair. The
    counts are given as well, because the two shares have different denominators.
    """
    rows = np.isin(scores.labels, columns)
    labels, classes = scores.labels[rows], len(class_names)
    after = columns[scores.tuned[rows][:, columns].argmax(axis=1)]
    if scores.zero_shot is None:
        alone = confused_pairs(labels, after, after, class_names)
        nothing = dict.fromkeys(("recovered", "broken", "counts"))
        return {**nothing, "pairs": [{**pair, "zero_shot": None} for pair in alone]}
    before = columns[scores.zero_shot[rows][:, columns].argmax(axis=1)]
    recovery = confusion_recovery(labels, before, after, pairs, classes)
    return {
        "recovered": recovery.recovered_share,
        "broken": recovery.broken_share,
        "counts": {
            "zero_shot_errors_in_pairs": recovery.errors,
            "recovered": recovery.recovered,
            "zero_shot_right": recovery.right,
            "broken": recovery.broken,
        },
        "pairs": confused_pairs(labels, before, after, class_names),
    }


def confused_pairs(
    labels: Ints, before: Ints, after: Ints, class_names: Sequence[str], most: int = 20
) -> list[Report]:
    """Return the pairs of classes that are mistaken most often before or after tuning, worst first.

    Args:
        labels: (images,) true classes.
        before: (images,) predictions of the zero-shot model.
        after: (images,) predictions of the tuned one.
        class_names: one for each class.
        most: how many pairs.
    """
    first, second = (confusion_counts(labels, guesses) for guesses in (before, after))
    errors = sorted(cell for cell in {*first, *second} if cell[0] != cell[1])
    worst = sorted(errors, key=lambda cell: -max(first[cell], second[cell]))[:most]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "zero_shot": first[true, predicted],
            "tuned": second[true, predicted],
        }
        for true, predicted in worst
    ]


def classes_of_worst(pairs: Iterable[tuple[Class, Class]], most: int) -> set[Class]:
    """Return the classes of the worst pairs; a pair that no longer fits is left out.

    Args:
        pairs: of confused classes, the worst first.
        most: classes that are returned, at most.
    """
    kept: set[Class] = set()
    for pair in pairs:
        if len(kept.union(pair)) <= most:
            kept.update(pair)
    return kept


def confusion_counts(labels: Ints, predictions: Ints) -> Counter[ClassPair]:
    """Return how many images of a class, the first of a pair, are taken for the second one."""
    return Counter(zip(labels.tolist(), predictions.tolist(), strict=True))
