"""A new calibrator is one file, `beta.py`, and one entry: nothing else knows about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capt_deploy.serving.classifier import Classifier
from capt_train.calibrate.choose import candidates, choose_calibration, fit_calibration
from capt_train.calibrators import CALIBRATORS
from capt_train.run.fitted import Fitted
from capt_train.run.folder import TunedModel
from export.source.model import source_from_run
from export.writer import ExportOptions, export
from tests.export import beta
from tests.export.distances import coloured_noise


@pytest.fixture(autouse=True)
def _beta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CALIBRATORS, beta.ENTRY.name, beta.ENTRY)


def test_it_is_a_candidate_and_is_chosen_where_the_reliability_curve_is_a_beta_curve() -> None:
    random = np.random.default_rng(0)
    odds = random.normal(1, 3, 4000)
    raw = np.stack([np.maximum(odds, -odds), np.zeros(4000)], axis=1)
    chance = 1 / (1 + np.exp(-beta.curve(raw[:, 0], 0.3, 2.5, -0.4)))
    labels = (random.random(4000) > chance).astype(np.int64)
    assert "beta" in candidates(None, all_classes=False)
    choice = choose_calibration(raw, labels, ["temperature", "beta"])
    assert choice.calibration.calibrator == "beta"
    top_label = choice.calibration.top_label
    assert top_label is not None
    _, probabilities = choice.calibration.apply(raw)
    assert np.abs(probabilities.max(axis=1) - np.maximum(chance, 0.5)).mean() < 0.02


@torch.no_grad()
def test_a_run_keeps_it_and_a_bundle_gives_its_probabilities(
    text_model: TunedModel, tmp_path: Path
) -> None:
    pixels = coloured_noise(120)
    images = text_model.learner.image_embeddings(torch.from_numpy(pixels))
    raw = text_model.raw_logits(images).double().numpy()
    labels = np.random.default_rng(0).integers(0, raw.shape[1], len(raw))
    calibration = fit_calibration("beta", raw, labels)
    fitted = replace(text_model.fitted, calibration=calibration)
    written = json.loads(json.dumps(fitted.to_dict()))
    learned = text_model.learner.learned
    assert Fitted.from_dict(written, learned).calibration == calibration

    source = source_from_run(replace(text_model, fitted=fitted))
    bundle = export(source, tmp_path / "beta.capt", ExportOptions(("fp32", "fp16")))
    _, expected = calibration.apply(raw)
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 0.02)):
        classifier = Classifier.load(bundle, precision=precision)
        found = np.stack([one.probabilities for one in classifier.run(pixels)])
        np.testing.assert_allclose(found, expected, atol=tolerance)
    with_temperature_alone = replace(calibration, top_label=None).apply(raw)[1]
    assert np.abs(with_temperature_alone - expected).max() > 0.02
