"""Graphs with calibrators inside, in a real runtime, against what was fitted."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capt_deploy.bundle.read import open_bundle
from capt_deploy.confidence.calibration import Calibration, TopLabelMap, VectorScaling
from capt_deploy.core.errors import GateError
from capt_deploy.evaluation.evaluate import Report
from capt_deploy.evaluation.scoring import score_bundle
from capt_deploy.metrics.calibration import softmax
from capt_deploy.serving.classifier import Classifier
from capt_train.run.folder import TunedModel
from export.graph import visual
from export.graph.visual import _TopLabel
from export.source.classes import with_classes
from export.source.model import Source, distance_aware, source_from_run
from export.text.graph import write_open_vocabulary
from export.writer import ExportOptions, export
from tests.export.distances import adjusted, coloured_noise, factors_by_hand

FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx"}
LINE = TopLabelMap((0.0,), (0.3,), 0.6, 0.6)
STEPS = TopLabelMap((-1.0, -0.4, 0.5, 1.5), (-0.7, -0.6, 1.0, 1.1), 0.8, 1.3)
VECTOR = VectorScaling((1.15, 0.9, 1.05, 0.95), (0.8, -0.5, -0.6, 0.3))
CALIBRATIONS = {
    "line": Calibration(1.7, top_label=LINE, calibrator="line"),
    "isotonic": Calibration(1.7, top_label=STEPS, calibrator="isotonic"),
    "vector": Calibration(1.7, VECTOR, calibrator="vector"),
}
CASES = ("line", "isotonic", "vector", "isotonic with DAC")


def calibrated(model: TunedModel, calibration: Calibration) -> TunedModel:
    return replace(model, fitted=replace(model.fitted, calibration=calibration))


@pytest.fixture(scope="module")
def exported(
    text_model: TunedModel, whole_model: TunedModel, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a function that exports a case, once: model, source, and bundle."""
    made: dict[str, tuple[TunedModel, Source, Path]] = {}

    def of(case: str) -> tuple[TunedModel, Source, Path]:
        if case not in made:
            name, _, dac = case.partition(" with ")
            own = calibrated(whole_model if name == "vector" else text_model, CALIBRATIONS[name])
            source = distance_aware(source_from_run(own)) if dac else source_from_run(own)
            out = tmp_path_factory.mktemp("maps") / "x.capt"
            made[case] = own, source, export(source, out, ExportOptions((*FILES,)))
        return made[case]

    return of


def by_hand(
    model: TunedModel, embedding: NDArray[Any], temperature: float, dac: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logits and probabilities of embeddings: a·z + b, T, γ, and then the map."""
    own = model.fitted.calibration
    logits = (
        model.backbone.scale * embedding.astype(float) @ model.class_rows.rows.double().numpy().T
    )
    if own.vector is not None:
        logits = logits * np.array(own.vector.scales) + np.array(own.vector.biases)
    logits = logits / temperature
    if dac:
        logits = adjusted(logits, factors_by_hand(model))
    probabilities = softmax(logits)
    if own.top_label is not None:
        for row, best in enumerate(probabilities.argmax(axis=1)):
            before = probabilities[row, best]
            others = np.delete(probabilities[row], best).sum()
            wanted = 1 / (1 + np.exp(-own.top_label(np.log(before) - np.log(others))))
            probabilities[row] *= (1 - wanted) / others
            probabilities[row, best] = wanted
            assert probabilities[row].argmax() == best  # else LEAD would have a say
    return logits, probabilities


@torch.no_grad()
@pytest.mark.parametrize("precision", FILES)
@pytest.mark.parametrize("case", CASES)
def test_a_runtime_says_what_was_fitted(exported: Any, case: str, precision: str) -> None:
    model, _, bundle = exported(case)
    loaded = Classifier.load(bundle, precision=precision)
    pixels = coloured_noise()
    found = loaded.backend.run(pixels)
    temperature = loaded.manifest.calibration[precision]["temperature"]
    logits, probabilities = by_hand(model, found.embedding, temperature, "DAC" in case)
    assert case == "vector" or len({*logits.argmax(axis=1)}) >= 3
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, probabilities, atol=2e-5)
    if precision == "fp32":
        images = model.learner.image_embeddings(torch.from_numpy(pixels))
        np.testing.assert_allclose(found.embedding, images, atol=1e-5)
        if "DAC" not in case:
            _, own = model.fitted.calibration.apply(model.raw_logits(images).numpy())
            np.testing.assert_allclose(found.probabilities, own, atol=1e-4)
            np.testing.assert_allclose(found.logits, model.logits(images).numpy(), atol=1e-4)
    if case != "vector":
        plain = softmax(found.logits).max(axis=1)
        assert np.abs(found.probabilities.max(axis=1) - plain).max() > 0.05


@pytest.mark.parametrize("case", CASES)
def test_bundle_and_lone_graph_say_how_they_are_calibrated(exported: Any, case: str) -> None:
    model, _, bundle = exported(case)
    own = model.fitted.calibration
    for path in (bundle, bundle / "model.onnx", bundle / "model.fp16.onnx"):
        manifest = Classifier.load(path).manifest
        found = manifest.calibration_of("fp32")
        assert (found.top_label, found.vector) == (own.top_label, own.vector)
    assert type(manifest).from_dict(manifest.to_dict(), "again") == manifest


def test_old_bundles_know_nothing_of_it() -> None:
    golden = Path(__file__).parents[2] / "golden"
    for name in ("tiny.capt", "open.capt"):
        bundle = open_bundle(golden / name)
        assert (bundle.manifest.top_label, bundle.manifest.vector_scaling) == (None, None)
        assert bundle.decisions() is None
        loaded = Classifier.load(golden / name)
        own = loaded(next((golden / "photos").rglob("*.png")))
        assert (own.prediction_set, own.rejected, own.familiarity) == (None, None, None)


@pytest.mark.parametrize("case", ["isotonic", "vector", "isotonic with DAC"])
def test_bundle_and_run_are_evaluated_alike(exported: Any, photos: Path, case: str) -> None:
    model, _, bundle = exported(case)
    report: Report = score_bundle(bundle, photos).report()
    raw = Calibration()  # what was there before all of it
    plain = replace(model, fitted=replace(model.fitted, calibration=raw))
    again = score_bundle(
        export(source_from_run(plain), bundle.parent / f"{case}.capt", ExportOptions()), photos
    ).report()
    for scope in ("base", "new", "all"):
        if report[scope] is not None:
            assert report["uncalibrated"][scope] == pytest.approx(again[scope], abs=1e-3)
            assert report[scope]["nll"] != pytest.approx(again[scope]["nll"], abs=1e-3)


def test_lists_of_classes_keep_the_scaling_of_their_own(
    whole_model: TunedModel, tmp_path: Path
) -> None:
    model = calibrated(whole_model, CALIBRATIONS["vector"])
    source = with_classes(source_from_run(model), [model], ["tabby cat", "red ball", "blue sky"])
    loaded = Classifier.load(export(source, tmp_path / "x.capt", ExportOptions()))
    assert loaded.manifest.calibration_of("fp32").vector == VectorScaling(
        (1.0, 0.95, 1.15), (0.0, 0.3, 0.8)
    )
    found = loaded.backend.run(coloured_noise(50))
    raw = model.backbone.scale * found.embedding @ source.rows.rows.numpy().T
    expected = (raw * [1.0, 0.95, 1.15] + [0.0, 0.3, 0.8]) / 1.7
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)
    again = with_classes(source, [model], ["blue sky", "tabby cat"])
    assert again.calibration.vector == VectorScaling((1.15, 1.0), (0.8, 0.0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["isotonic", "vector"])
def test_added_classes_are_calibrated_like_listed_ones(
    text_model: TunedModel, whole_model: TunedModel, tmp_path: Path, name: str
) -> None:
    model = calibrated(whole_model if name == "vector" else text_model, CALIBRATIONS[name])
    source = source_from_run(model)
    listed = with_classes(source, [model], [*source.class_names, "tabby cat"])
    added = Classifier.load(
        export(
            *(source, tmp_path / "open.capt", ExportOptions()),
            lambda folder: write_open_vocabulary([model], folder, source.class_names),
        )
    )
    added.add_classes(["tabby cat"])
    pixels = coloured_noise(40)
    images = model.learner.image_embeddings(torch.from_numpy(pixels))
    raw = model.backbone.scale * (images @ listed.rows.rows.T).numpy()
    expected = listed.calibration.apply(raw)[1]
    assert expected.shape == (40, 5)
    for one, shares in zip(added.run(pixels), expected, strict=True):
        np.testing.assert_allclose(one.probabilities, shares, atol=1e-4)


def test_a_graph_with_another_map_does_not_pass(
    text_model: TunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(LINE, values=(0.31,))
    monkeypatch.setattr(visual, "_TopLabel", lambda _, classes: _TopLabel(other, classes))
    source = source_from_run(calibrated(text_model, CALIBRATIONS["line"]))
    with pytest.raises(GateError, match="expected probabilities to differ"):
        export(source, tmp_path / "x.capt", ExportOptions())


@st.composite
def maps(draw: Any) -> TopLabelMap:
    knots = draw(st.integers(1, 6))
    gaps = draw(st.lists(st.floats(0.25, 3), min_size=knots, max_size=knots))
    rises = draw(st.lists(st.floats(0, 2), min_size=knots, max_size=knots))
    slopes = draw(st.tuples(st.floats(0, 2), st.floats(0, 2)))
    positions, values = np.cumsum(gaps) - 3, np.cumsum(rises) - 2
    return TopLabelMap(tuple(positions.tolist()), tuple(values.tolist()), *slopes)


@settings(max_examples=60, deadline=None)
@given(
    own=maps(),
    seed=st.integers(0, 1000),
    classes=st.integers(2, 9),
    size=st.sampled_from([0.01, 3.0, 30.0]),
)
def test_the_operators_are_the_map(own: TopLabelMap, seed: int, classes: int, size: float) -> None:
    logits = np.random.default_rng(seed).normal(0, size, (20, classes)).astype(np.float32)
    found = _TopLabel(own, classes)(torch.from_numpy(logits)).numpy()
    expected = own.shift(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert found.argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(softmax(found), softmax(expected), atol=1e-5)


def test_many_steep_steps_cost_no_digits() -> None:
    random = np.random.default_rng(0)
    positions = np.cumsum(random.uniform(1e-4, 0.2, 60))
    values = np.cumsum(random.exponential(0.1, 60)) - 1
    own = TopLabelMap(tuple(positions.tolist()), tuple(values.tolist()), 1.0, 1.0)
    # twenty apart from the last knot, where every step is behind it
    logits = np.array([[positions[-1] + 20.0, 0.0]], np.float32)
    found = _TopLabel(own, 2)(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(found, [[values[-1] + 20, 0]], atol=2e-5)


def test_ties_and_extreme_logits() -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0], [1e4, -1e4, 0.0], [0.0, -1e30, -1e30]])
    for own in (LINE, STEPS):
        found = _TopLabel(own, 3)(logits)
        assert found.softmax(dim=1).isfinite().all()
        assert found.argmax(dim=1).tolist() == [0, 0, 0]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
@pytest.mark.parametrize(
    ("case", "precision", "sm"),
    [
        ("line", "fp32", 80),
        ("isotonic", "fp32", 120),
        ("isotonic", "fp16", 75),
        ("isotonic with DAC", "fp16", 89),
        ("vector", "fp16", 86),
    ],
)
def test_engines_are_built(exported: Any, case: str, precision: str, sm: int) -> None:
    from capt_deploy.backends.tensorrt.engine import build_engine

    graph = open_bundle(exported(case)[2]).graph(precision).onnx
    assert len(build_engine(graph, sm=sm)) > 10_000
