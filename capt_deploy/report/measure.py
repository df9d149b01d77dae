"""The figures of a report, made once for all of its forms."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.evaluation.evaluate import SCOPES, Report, Scores, among, evaluate
from capt_deploy.metrics.calibration import Floats, Ints
from capt_deploy.metrics.intervals import Interval, accuracy_interval, interval_of_harmonic_mean
from capt_deploy.metrics.reliability import Reliability, calibrated_ece, reliability, risk_coverage
from capt_deploy.report.data import Answers, ReportData

ACCURACIES = ("base", "new", "harmonic_mean", "all")
BINS = 15
_SEED = 0


@dataclass(frozen=True, eq=False)
class Model:
    """What is measured of one model."""

    name: str
    report: Report  # of `evaluate`
    intervals: Mapping[str, Interval]  # of the accuracies that exist, 95 %
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


def _accuracy_intervals(right: Mapping[str, NDArray[np.bool_]]) -> dict[str, Interval]:
    """Return intervals of accuracies, from which images of each scope are right."""
    found = {scope: accuracy_interval(own) for scope, own in right.items()}
    if "base" in right and "new" in right:
        shares = float(right["base"].mean()), float(right["new"].mean())
        both = found["base"], found["new"]
        found["harmonic_mean"] = interval_of_harmonic_mean(shares, both)
    return found
