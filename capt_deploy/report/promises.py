"""What prediction sets and rejection come to on these images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.decisions import Decisions
from capt_deploy.report.data import ReportData
from capt_deploy.report.measure import probabilities_among, scope_columns

COVERAGES = (0.8, 0.9, 0.95)
ACCURACIES = (0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Promise:
    """What was wanted, and what came of it among the images of one scope; shares in 0-1."""

    kind: str  # "coverage" of sets, or "accuracy" of what is not rejected
    wanted: float
    scope: str
    found: float | None  # None where nothing is accepted, or nothing can be promised
    size: float | None = None  # classes in a set, on average
    accepted: float | None = None  # share of images


def promises(data: ReportData) -> list[Promise]:
    """Return them for base and new classes, among all classes; none without validation images."""
    if data.decisions is None:
        return []
    every = np.arange(len(data.class_names))
    probabilities, labels = probabilities_among(data.labels, data.main, every)
    scopes = [scope for scope in scope_columns(data) if scope != "all"] or ["all"]
    found = []
    for scope in scopes:
        rows = np.isin(labels, scope_columns(data)[scope])
        found += _of(data.decisions, scope, probabilities[rows], labels[rows])
    return found


def _of(
    decisions: Decisions, scope: str, probabilities: NDArray[np.floating], labels: NDArray[np.int64]
) -> list[Promise]:
    found = []
    for coverage in COVERAGES:
        sets = decisions.sets.sets(probabilities, coverage)
        inside = float(sets[np.arange(len(labels)), labels].mean())
        size = float(sets.sum(axis=1).mean())
        found.append(Promise("coverage", coverage, scope, inside, size=size))
    right = probabilities.argmax(axis=1) == labels
    confidence = probabilities.astype(np.float32).max(axis=1)
    for accuracy in ACCURACIES:
        threshold = decisions.rejection.threshold(accuracy)
        if threshold is None:
            found.append(Promise("accuracy", accuracy, scope, None))
            continue
        kept = confidence >= np.float32(threshold)
        share = float(right[kept].mean()) if kept.any() else None
        found.append(Promise("accuracy", accuracy, scope, share, accepted=float(kept.mean())))
    return found
