"""Whether prediction sets and rejection keep what they promise, on these images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.decisions import Decisions
from capt_deploy.evaluation.evaluate import Evaluation
from capt_deploy.metrics.intervals import accuracy_interval
from capt_deploy.metrics.probabilities import Ints
from capt_deploy.report.measure import Predictions, scope_columns

COVERAGES = (0.8, 0.9, 0.95)
ACCURACIES = (0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Promise:
    """A promised share (0-1), and the share measured on the images of one scope."""

    kind: str  # "coverage" of prediction sets, or "accuracy" of what is not rejected
    promised: float
    scope: str
    measured: float | None  # None where nothing is accepted, or nothing can be promised
    size: float | None = None  # classes in a set, on average
    accepted: float | None = None  # share of images
    verdict: str = ""  # "kept", "kept within chance", "not kept"


def promises(evaluation: Evaluation, predictions: Predictions) -> list[Promise]:
    """Return promises for base and new classes, among all classes; none without decisions."""
    if evaluation.decisions is None:
        return []
    columns = scope_columns(evaluation)
    measured = []
    for scope in [scope for scope in columns if scope != "all"] or ["all"]:
        rows = np.isin(predictions.labels, columns[scope])
        images = predictions.main[rows], predictions.labels[rows]
        measured += _of_scope(evaluation.decisions, scope, *images)
    return measured


def _of_scope(
    decisions: Decisions, scope: str, probabilities: NDArray[np.floating], labels: Ints
) -> list[Promise]:
    measured = []
    for promised in COVERAGES:
        sets = decisions.sets.sets(probabilities, promised)
        held = sets[np.arange(len(labels)), labels]
        share, size = float(held.mean()), float(sets.sum(axis=1).mean())
        verdict = _verdict(promised, held)
        measured.append(Promise("coverage", promised, scope, share, size=size, verdict=verdict))
    right = probabilities.argmax(axis=1) == labels
    confidence = probabilities.astype(np.float32).max(axis=1)
    for promised in ACCURACIES:
        threshold = decisions.rejection.threshold(promised)
        if threshold is None:
            measured.append(Promise("accuracy", promised, scope, None))
            continue
        accepted = confidence >= np.float32(threshold)
        some = bool(accepted.any())
        measured.append(
            Promise(
                *("accuracy", promised, scope),
                float(right[accepted].mean()) if some else None,
                accepted=float(accepted.mean()),
                verdict=_verdict(promised, right[accepted]) if some else "",
            )
        )
    return measured


def _verdict(promised: float, true: NDArray[np.bool_]) -> str:
    """Return whether a share is as high as promised, or so near that chance may explain it."""
    if true.mean() >= promised:
        return "kept"
    return "kept within chance" if accuracy_interval(true)[1] >= promised else "not kept"
