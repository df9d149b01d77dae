"""The report of `capt-eval`: the same numbers for a run and for its bundle."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.distance_aware import applied
from capt_deploy.confidence.top_label import TopLabelMap, probabilities_of
from capt_deploy.confidence.vector_scaling import VectorScaling
from capt_deploy.core.errors import ConfigError
from capt_deploy.metrics.calibration import Floats, Ints, all_metrics, confusion_recovery
from capt_deploy.metrics.intervals import harmonic_mean

Report = dict[str, Any]
Pair = tuple[int, int]  # true class, class it is mistaken for

SCOPES = ("base", "new", "all")


@dataclass(frozen=True)
class Scores:
    """Logits of one split over all classes, tuned beside zero-shot."""

    labels: Ints  # (samples,)
    # (samples, classes), scaled and calibrated, but without the factors and the map below
    tuned: NDArray[np.floating]
    # Likewise, each model by its own temperature; None where the frozen model is not at hand, as
    # in a bundle whose visual side was tuned.
    zero_shot: NDArray[np.floating] | None
    temperature: float = 1.0  # that `tuned` has been divided by
    zero_shot_temperature: float = 1.0
    # (classes,) of distance-aware calibration; None without it. Which one an image gets depends on
    # the classes that it is measured among.
    factors: NDArray[np.floating] | None = None
    top_label: TopLabelMap | None = None  # what else calibrates `tuned`
    vector: VectorScaling | None = None  # that `tuned` was scaled with before the temperature

    @property
    def uncalibrated(self) -> NDArray[np.floating]:
        """What `tuned` was before anything was fitted to validation images."""
        raw = self.tuned * self.temperature
        return raw if self.vector is None else self.vector.undone(raw)


def evaluate(
    scores: Scores,
    class_names: Sequence[str],
    tuned: Sequence[bool],
    pairs: Iterable[Pair],
    scope: str | None = None,
) -> Report:
    """Measure everything of METHOD 10 that needs one model only.

    `base` are the classes the prompt was tuned on, `new` the others: each is measured on its own
    samples with its own columns, `all` with all columns. What does not exist is None.

    Args:
        scores: logits of tuned and zero-shot model on the same samples.
        class_names: one per column.
        tuned: one per column.
        pairs: the confusions mined from the training images, for recovery and breakage.
        scope: `base`, `new` or `all` to measure only that.

    Raises:
        ConfigError: the scope does not exist here.
    """
    is_tuned = np.asarray(tuned)
    columns = {
        "base": np.flatnonzero(is_tuned),
        "new": np.flatnonzero(~is_tuned),
        "all": np.arange(len(is_tuned)),
    }
    if is_tuned.all():  # nothing is new, so base and all would say the same twice
        columns["base"] = columns["new"]
    report = _measure(scores.labels, scores.tuned, columns, scope, scores.factors, scores.top_label)
    if scope and report[scope] is None:
        raise ConfigError(f"no images of {scope!r} classes to evaluate; was the run tuned on all?")
    report["uncalibrated"] = _measure(scores.labels, scores.uncalibrated, columns, scope)
    if scores.zero_shot is None:
        report["confusion"] = _confusion_alone(scores, class_names, columns)
        report["zero_shot"] = report["uncalibrated"]["zero_shot"] = None
        return report
    report["confusion"] = _confusion(scores, scores.zero_shot, class_names, columns, pairs)
    report["zero_shot"] = _measure(scores.labels, scores.zero_shot, columns, scope)
    raw_zero_shot = scores.zero_shot * scores.zero_shot_temperature
    report["uncalibrated"]["zero_shot"] = _measure(scores.labels, raw_zero_shot, columns, scope)
    return report


def _measure(
    labels: Ints,
    logits: NDArray[np.floating],
    columns: Mapping[str, NDArray[np.int64]],
    scope: str | None,
    factors: NDArray[np.floating] | None = None,
    top_label: TopLabelMap | None = None,
) -> Report:
    report: Report = {}
    for name in SCOPES:
        if scope in (None, name) and np.isin(labels, columns[name]).any():
            found = among(labels, logits, columns[name], factors, top_label)
            report[name] = all_metrics(*found)
        else:
            report[name] = None
    both = report["base"] and report["new"]
    report["harmonic_mean"] = (
        harmonic_mean(report["base"]["accuracy"], report["new"]["accuracy"]) if both else None
    )
    return report


def among(
    labels: Ints,
    logits: NDArray[np.floating],
    columns: NDArray[np.int64],
    factors: NDArray[np.floating] | None = None,
    top_label: TopLabelMap | None = None,
) -> tuple[Floats, Ints]:
    """Return probabilities among some classes of the images that belong to them, and their labels.

    Args:
        labels: (images,) columns.
        logits: (images, classes), calibrated.
        columns: of these classes, ascending.
        factors: (classes,) of distance-aware calibration.
        top_label: what else calibrates.
    """
    rows = np.flatnonzero(np.isin(labels, columns))
    own = logits[rows][:, columns]
    if factors is not None:
        own = applied(own, factors[columns])
    return probabilities_of(own, top_label), np.searchsorted(columns, labels[rows])


def _confusion_alone(
    scores: Scores, class_names: Sequence[str], columns: Mapping[str, NDArray[np.int64]]
) -> Report:
    """Return the tuned model's confusions, with nothing to compare them with."""
    labels, after = _own_predictions(scores, scores.tuned, columns)
    pairs = confused_pairs(labels, after, after, class_names)
    nothing = dict.fromkeys(("recovered", "broken", "counts"))
    return {**nothing, "pairs": [{**pair, "zero_shot": None} for pair in pairs]}


def _own_predictions(
    scores: Scores, logits: NDArray[np.floating], columns: Mapping[str, NDArray[np.int64]]
) -> tuple[Ints, Ints]:
    """Return labels and predictions of the samples of classes tuned on, among these classes."""
    own = columns["base"] if len(columns["base"]) else columns["all"]
    rows = np.isin(scores.labels, own)
    return scores.labels[rows], own[logits[rows][:, own].argmax(axis=1)]


def _confusion(
    scores: Scores,
    zero_shot: NDArray[np.floating],
    class_names: Sequence[str],
    columns: Mapping[str, NDArray[np.int64]],
    pairs: Iterable[Pair],
) -> Report:
    """Recovery and breakage among the classes tuned on.

    `recovered` is the share of the zero-shot model's errors in mined pairs that are right after
    tuning; `broken` the share of its right answers that are wrong after it, in any pair. The
    counts stand beside them, for the two are shares of different numbers.
    """
    labels, before = _own_predictions(scores, zero_shot, columns)
    _, after = _own_predictions(scores, scores.tuned, columns)
    mined = np.zeros((len(class_names), len(class_names)), dtype=bool)
    for true, predicted in pairs:
        mined[true, predicted] = True
    recovery = confusion_recovery(labels, before, after, mined)
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
    """Return who is mistaken for whom most often, before tuning or after it, worst first."""
    counts = np.zeros((2, len(class_names), len(class_names)), dtype=np.int64)
    for table, predictions in zip(counts, (before, after), strict=True):
        np.add.at(table, (labels, predictions), 1)
        np.fill_diagonal(table, 0)
    worst = np.argsort(-counts.max(axis=0), axis=None, kind="stable")[:most]
    rows = [np.unravel_index(cell, counts.shape[1:]) for cell in worst]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "zero_shot": int(counts[0, true, predicted]),
            "tuned": int(counts[1, true, predicted]),
        }
        for true, predicted in rows
        if counts[:, true, predicted].any()
    ]
