"""Measure one cell: tune, then accuracy and calibration errors under each calibration."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.confidence.distance_aware import TunedTexts
from capt_deploy.core.errors import CaptError
from capt_deploy.core.version import __version__
from capt_deploy.data.datasets import read_dataset
from capt_deploy.evaluation.evaluate import SCOPES, Scores, evaluate
from capt_deploy.metrics.calibration import all_metrics, softmax
from capt_train.calibrate.temperature import fit_temperature
from capt_train.compare.plan import Cell, Target
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.method.class_rows import UNCHANGED
from capt_train.pipeline import Trained, tune_and_measure
from capt_train.published.zs_norm import normalised
from capt_train.run.elsewhere import for_classes
from capt_train.run.evaluate import RunScores, score_model
from capt_train.run.folder import TunedModel

Figures = dict[str, Any]


def measure(cell: Cell, calibrations: Sequence[str]) -> Figures:
    """Tune into a temporary folder and return the figures of a cell.

    Test images are only measured on: nothing is chosen by them.

    Args:
        cell: what to tune, and on what.
        calibrations: names of `plan.CALIBRATIONS`.

    Raises:
        CaptError: the data, the model or the settings cannot be used.
    """
    read_dataset(cell.config.data).items("test")  # before time is spent
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trained = tune_and_measure(cell.config, Path(folder) / "run")
        seconds = time.perf_counter() - started
        report = trained.report
        # vector scaling moves labels, and no paper has it
        raw = report["uncalibrated"]
        figures = {scope: raw[scope] and raw[scope]["accuracy"] for scope in SCOPES}
        return {
            **figures,
            "harmonic": raw["harmonic_mean"],
            "ece": {name: _errors(trained, name) for name in calibrations},
            "targets": {
                name: _measure_elsewhere(trained.model, target)
                for name, target in cell.targets.items()
            },
            "parts": report["parts"],
            "numbers": report["trained_parameters"],
            "seconds": round(seconds, 2),
            "images": report["images"],
            "transductive": report["transductive"],
            "data_fingerprint": trained.model.split.fingerprint()[:12],
            "capt": __version__,
        }


def _errors(trained: Trained, name: str) -> dict[str, float | None]:
    """Return the ECE with 15 bins in each scope, under a calibration.

    None where the calibration cannot be: without held-out images, or where the run has fitted the
    confidence of new classes itself.

    - `none`: the logits as they are;
    - `temperature`: one, fitted on held-out images of the tuned classes;
    - `chosen`: as the run calibrates, see `calibrate.choose`;
    - `dac`: the temperature, and for new classes DAC (arXiv 2402.04655);
    - `sals`: each image's logits in the range of its zero-shot ones (arXiv 2407.13588).
    """
    scores = trained.scores.scores
    model = trained.model
    raw = scores.uncalibrated
    if name == "chosen":
        return _ece(trained.scores)
    if name == "sals":
        return {scope: _sals(raw, model, scope) for scope in SCOPES}
    calibration, held_out = Calibration(), trained.held_out
    if name in ("temperature", "dac"):
        if not len(held_out) or (name == "dac" and model.fitted.outside != UNCHANGED):
            return dict.fromkeys(SCOPES)
        calibration = Calibration(fit_temperature(held_out.tuned, held_out.labels))
    if name == "dac":
        calibration = replace(calibration, factors=_distance_factors(model))
    scaled = replace(raw, tuned=calibration.scale(raw.tuned), calibration=calibration)
    return _ece(replace(trained.scores, scores=scaled))


def _ece(scores: RunScores) -> dict[str, float | None]:
    model = scores.model
    report = evaluate(scores.scores, model.class_names, model.tuned, ())
    return {scope: report[scope] and report[scope]["ece_15"] for scope in SCOPES}


def _sals(raw: Scores, model: TunedModel, scope: str) -> float | None:
    tuned = np.asarray(model.tuned)
    chosen = {"base": tuned, "new": ~tuned, "all": np.full(len(tuned), True)}[scope]
    columns = np.flatnonzero(chosen)
    if not len(columns) or raw.zero_shot is None or (scope == "base" and tuned.all()):
        return None
    rows = np.isin(raw.labels, columns)
    labels = np.searchsorted(columns, raw.labels[rows])
    logits, frozen = (torch.from_numpy(z[rows][:, columns]) for z in (raw.tuned, raw.zero_shot))
    probabilities = softmax(normalised(logits, frozen).double().numpy())
    return float(all_metrics(probabilities, labels)["ece_15"])


def _distance_factors(model: TunedModel) -> tuple[float, ...]:
    """Return γ of DAC: 1 for classes that were tuned on."""
    tuned = np.asarray(model.tuned)
    rows = model.class_rows.cpu().rows.numpy()
    hand_written = model.zero_shot.detach().cpu().numpy()
    factors = np.ones(len(rows), np.float32)
    texts = TunedTexts(rows[tuned], hand_written[tuned])
    if not tuned.all():
        factors[~tuned] = texts.factors(rows[~tuned], hand_written[~tuned])
    return tuple(factors.tolist())


def _measure_elsewhere(model: TunedModel, target: Target) -> Figures:
    """Return accuracy and ECE of a tuned model on another data set, or why there are none."""
    fingerprint = model.backbone.fingerprint()
    try:
        dataset = read_dataset(target.path)
        other = for_classes(model, dataset.class_names, target.template)
        with closing(EmbeddingCache(fingerprint, model.backbone.device.type)) as cache:
            report = score_model(other, cache, dataset, "test").report("all")
    except CaptError as error:
        return {"all": None, "ece": None, "error": str(error)}
    return {"all": report["all"]["accuracy"], "ece": report["all"]["ece_15"]}
