"""The figures of a report, made once for all of its forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.bootstrap import bootstrap_intervals
from capt_deploy.evaluation import SCOPES, Report, Scores, among, evaluate, harmonic_mean
from capt_deploy.metrics import Floats, Ints
from capt_deploy.reliability import Reliability, calibrated_ece, reliability, risk_coverage
from capt_deploy.report.data import Answers, ReportData

ACCURACIES = ("base", "new", "harmonic_mean", "all")
BINS = 15
_RESAMPLES = 1000
_LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True, eq=False)
class Model:
    """What is measured of one model."""

    name: str
    report: Report  # of `evaluate`
    # Of accuracies, 95 %. Those that do not exist are missing, and those that no resampling can
    # tell, because all images are right or all are wrong.
    intervals: Mapping[str, tuple[float, float]]
    # By scope: mean and 95 % quantile of the ECE that chance alone would give, see `calibrated_ece`
    chance: Mapping[str, tuple[float, float]]
    before: Mapping[str, Reliability]  # by scope; uncalibrated
    after: Mapping[str, Reliability]
    risks: Mapping[str, tuple[Floats, Floats]]  # by scope: coverage, risk


def scope_columns(data: ReportData) -> dict[str, Ints]:
    """Return the classes of the scopes that have images, as `evaluate` has them.

    Where the classes are all tuned on or all not, there is only `all`.
    """
    tuned = np.asarray(data.tuned, bool)
    every = np.arange(len(tuned))
    columns = dict(zip(SCOPES, (every[tuned], every[~tuned], every), strict=True))
    if tuned.all() or not tuned.any():
        return {"all": every}
    return {scope: own for scope, own in columns.items() if np.isin(data.labels, own).any()}


def measure(data: ReportData, model: Answers) -> Model:
    """Measure one model on every scope."""
    frozen = data.zero_shot if model is not data.zero_shot else None
    scores = Scores(
        data.labels,
        model.logits,
        None if frozen is None else frozen.logits,
        model.temperature,
        1.0 if frozen is None else frozen.temperature,
        model.factors,
        model.top_label,
        model.vector,
    )
    raw = scores.uncalibrated
    before, after, risks, chance, right = {}, {}, {}, {}, {}
    for scope, columns in scope_columns(data).items():
        probabilities, labels = probabilities_among(data.labels, model, columns)
        before[scope] = reliability(*among(data.labels, raw, columns), bins=BINS)
        after[scope] = reliability(probabilities, labels, bins=BINS)
        risks[scope] = risk_coverage(probabilities, labels)
        chance[scope] = calibrated_ece(probabilities, bins=BINS, seed=_SEED)
        right[scope] = probabilities.argmax(axis=1) == labels
    return Model(
        model.name,
        evaluate(scores, data.class_names, data.tuned, data.pairs),
        _accuracy_intervals(right),
        chance,
        before,
        after,
        risks,
    )


def probabilities_among(labels: Ints, model: Answers, columns: Ints) -> tuple[Floats, Ints]:
    """Return a model's probabilities among these classes; see `evaluation.among`."""
    return among(labels, model.logits, columns, model.factors, model.top_label)


def _accuracy_intervals(
    right: Mapping[str, NDArray[np.bool_]],
) -> dict[str, tuple[float, float]]:
    """Return bootstrap intervals of accuracies, from which images of each scope are right."""
    found: dict[str, tuple[float, float]] = {}
    for scope, own in right.items():
        found |= _intervals([own], {scope: lambda columns, _: float(columns[:, 0].mean())})
    if "base" in right and "new" in right:
        found |= _intervals([right["base"], right["new"]], {"harmonic_mean": _harmonic_mean})
    return found


def _intervals(
    parts: Sequence[NDArray[np.bool_]], metrics: Mapping[str, Callable[[Floats, Ints], float]]
) -> dict[str, tuple[float, float]]:
    """Resample images that are right or wrong: two columns stand for all classes.

    The label of an image is the part that it comes from.
    """
    right = np.concatenate(parts).astype(np.float64)
    if right.min() == right.max():
        return {}
    part = np.repeat(np.arange(len(parts)), [len(own) for own in parts])
    columns = np.stack([right, 1 - right], axis=1)
    return bootstrap_intervals(columns, part, metrics, _RESAMPLES, _LEVEL, _SEED)


def _harmonic_mean(columns: Floats, part: Ints) -> float:
    """Return it of the parts 0 and 1; 0 where a resample lacks one of them."""
    images = np.bincount(part, minlength=2)
    right = np.bincount(part, weights=columns[:, 0], minlength=2)
    base, new = (right / np.maximum(images, 1)).tolist()
    return harmonic_mean(base, new)
