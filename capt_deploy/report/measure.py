"""The figures of each model, measured once for the page, its Markdown and its JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from capt_deploy.evaluation.evaluate import SCOPES, Evaluation, Report, Scores, evaluate
from capt_deploy.metrics.intervals import Interval, accuracy_interval, interval_of_harmonic_mean
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_deploy.metrics.reliability import Reliability, calibrated_ece, reliability, risk_coverage

ZERO_SHOT = "zero-shot"
BINS = 15
FEW = 10  # images; a share of fewer says next to nothing
_SEED = 0


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class MeasuredModel:
    """Figures of one model, by scope (`base`, `new`, `all`)."""

    name: str
    report: Report  # from `evaluate`
    intervals: Mapping[str, Interval]  # of the accuracies, and of `harmonic_mean`; 95 %
    # Mean and 95 % quantile of the ECE that chance alone would give, see `calibrated_ece`
    chance: Mapping[str, tuple[float, float]]
    before: Mapping[str, Reliability]  # uncalibrated
    after: Mapping[str, Reliability]
    risks: Mapping[str, tuple[Floats, Floats]]  # coverage, risk


@dataclass(frozen=True, eq=False)
class Predictions:
    """Calibrated probabilities of the main and the zero-shot model among all classes."""

    labels: Ints  # (images,)
    main: Floats  # (images, classes)
    zero_shot: Floats | None  # likewise; None without a zero-shot model


def scope_columns(evaluation: Evaluation) -> dict[str, Ints]:
    """Return the columns of each scope that has images; only `all` where nothing else differs."""
    tuned, every = np.asarray(evaluation.tuned, bool), np.arange(len(evaluation.tuned))
    if tuned.all() or not tuned.any():
        return {"all": every}
    scopes = dict(zip(SCOPES, (every[tuned], every[~tuned], every), strict=True))
    labels = evaluation.main.labels
    return {scope: columns for scope, columns in scopes.items() if np.isin(labels, columns).any()}


def predict(evaluation: Evaluation) -> Predictions:
    """Return the probabilities of the main and the zero-shot model among all classes."""
    scores, every = evaluation.main, np.arange(len(evaluation.class_names))
    frozen = scores.zero_shot_alone
    zero_shot = None if frozen is None else frozen.among(every)[0]
    return Predictions(scores.labels, scores.among(every)[0], zero_shot)


def measure_models(evaluation: Evaluation) -> list[MeasuredModel]:
    """Return figures of all models, the zero-shot one first if the main model knows it."""
    main, frozen = evaluation.main, evaluation.main.zero_shot_alone
    models = {} if frozen is None else {ZERO_SHOT: frozen}
    for name, scores in evaluation.scores.items():  # all are compared with the same one
        models[name] = replace(
            scores,
            zero_shot=main.zero_shot,
            zero_shot_temperature=main.zero_shot_temperature,
        )
    return [_measure(evaluation, name, scores) for name, scores in models.items()]


def _measure(evaluation: Evaluation, name: str, scores: Scores) -> MeasuredModel:
    # One array of probabilities after the other: those of many images and classes are large
    before, after, risks, chance, right = {}, {}, {}, {}, {}
    report = evaluate(scores, evaluation.class_names, evaluation.tuned, evaluation.pairs)
    for scope, columns in scope_columns(evaluation).items():
        before[scope] = reliability(*scores.uncalibrated.among(columns), bins=BINS)
        probabilities, labels = scores.among(columns)
        after[scope] = reliability(probabilities, labels, bins=BINS)
        risks[scope] = risk_coverage(probabilities, labels)
        chance[scope] = calibrated_ece(probabilities, bins=BINS, seed=_SEED)
        right[scope] = probabilities.argmax(axis=1) == labels
        del probabilities
    return MeasuredModel(name, report, _intervals(right), chance, before, after, risks)


def _intervals(right: Mapping[str, NDArray[np.bool_]]) -> dict[str, Interval]:
    """Return intervals of accuracies, from which images of each scope are right."""
    intervals = {scope: accuracy_interval(images) for scope, images in right.items()}
    if "base" in right and "new" in right:
        shares = float(right["base"].mean()), float(right["new"].mean())
        both = intervals["base"], intervals["new"]
        intervals["harmonic_mean"] = interval_of_harmonic_mean(shares, both)
    return intervals
