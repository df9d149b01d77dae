"""DAC from the run to the report: factors, graphs, gate, scopes."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.confidence.calibration import Calibration
from capt_deploy.core.errors import GateError
from capt_deploy.data.datasets import read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_deploy.evaluation.scoring import score_bundle
from capt_deploy.metrics.calibration import all_metrics, softmax
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.check import check_bundle, run_on_files
from capt_deploy.verify.gate import compare_outputs
from capt_train.run.folder import TunedModel
from export.graph.visual import VisualClassifier
from export.proof.verify import run_torch_model
from export.source.model import Source, distance_aware, source_from_run
from export.writer import ExportOptions, export
from tests.export.distances import adjusted, coloured_noise, factors_by_hand

FILES = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}


@pytest.fixture(scope="module")
def source(text_model: TunedModel) -> Source:
    return distance_aware(source_from_run(text_model))


@pytest.fixture(scope="module")
def dac_bundle(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dac") / "dac.capt"
    return export(source, out, ExportOptions((*FILES, "bf16")))


@pytest.fixture(scope="module")
def plain_bundle(text_model: TunedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "plain.capt"
    return export(source_from_run(text_model), out, ExportOptions(tuple(FILES)))


def test_each_graph_multiplies_by_the_factor_of_the_most_probable_class(
    dac_bundle: Path, text_model: TunedModel
) -> None:
    factors = factors_by_hand(text_model)
    assert min(factors) < 0.9 and max(factors) > 1.05
    for precision in FILES:
        loaded = Classifier.load(dac_bundle, "onnxruntime", precision)
        logits, probabilities, embedding = loaded.backend.run(coloured_noise())
        temperature = loaded.manifest.calibration[precision]["temperature"]
        rows = text_model.backbone.scale / temperature * text_model.class_rows.rows.numpy()
        wanted = adjusted(embedding @ rows.T, factors)
        assert len({*wanted.argmax(axis=1)}) >= 3
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        np.testing.assert_allclose(probabilities, softmax(wanted), atol=1e-5)


def test_a_bundle_says_that_it_has_them(dac_bundle: Path, text_model: TunedModel) -> None:
    bundle = open_bundle(dac_bundle)
    for precision in FILES:
        calibration = bundle.manifest.calibration[precision]
        assert set(calibration) == {"temperature", "zero_shot_temperature", "distance_aware"}
        assert calibration["distance_aware"] is True
        found = bundle.calibration_of(precision).factors
        assert found is not None
        assert list(found) == pytest.approx(factors_by_hand(text_model), rel=1e-5)
    assert set(bundle.text_embeddings()) == {"text_embeddings", "bias", "zero_shot", "factors"}
    report = check_bundle(dac_bundle, text_model.config.data)
    assert all(own["passed"] for name in FILES for own in report[name].values())


def test_without_it_nothing_is_added(dac_bundle: Path, plain_bundle: Path) -> None:
    bundle = open_bundle(plain_bundle)
    for precision, file in FILES.items():
        assert "distance_aware" not in bundle.manifest.calibration[precision]
        assert bundle.calibration_of(precision).factors is None
        graphs = [onnx.load(path / file).graph for path in (dac_bundle, plain_bundle)]
        more, less = (Counter(node.op_type for node in graph.node) for graph in graphs)
        assert more - less == Counter({"ArgMax": 1, "Gather": 1, "Mul": 1})
        assert not less - more
    assert set(bundle.text_embeddings()) == {"text_embeddings", "bias", "zero_shot"}
    layers = [
        json.loads((path / "report.json").read_text())["graphs"]["int8"]["int8"]
        for path in (dac_bundle, plain_bundle)
    ]
    assert layers[0] == layers[1]  # what is left out of int8 does not depend on the factors


def change_factors(path: Path, change: Callable[[NDArray[Any]], NDArray[Any]]) -> bytes:
    model = onnx.load(path)
    (factors,) = [w for w in model.graph.initializer if w.name == "factors"]
    array = change(numpy_helper.to_array(factors))
    factors.CopyFrom(numpy_helper.from_array(array.astype(np.float32), factors.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("precision", FILES)
def test_the_gate_catches_shuffled_factors(
    dac_bundle: Path, source: Source, precision: str
) -> None:
    question = run_torch_model(source, 100)

    def passes(change: Callable[[NDArray[Any]], NDArray[Any]]) -> bool:
        graph = change_factors(dac_bundle / FILES[precision], change)
        files = [photo.path for photo in question.photos]
        preprocessing = source.learner.backbone.preprocess
        found = run_on_files(OnnxRuntime(graph, precision), preprocessing, files, "asking")
        result = compare_outputs(
            precision, question.expected, found, question.labels, source.calibration
        )
        return result.passed

    assert passes(lambda factors: factors)
    assert not passes(lambda factors: factors[::-1].copy())


def test_a_network_with_the_factors_of_other_classes_is_not_traced(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = VisualClassifier.__init__

    def wrong(self: VisualClassifier, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        assert self.factors is not None
        self.factors = self.factors.flip(0)

    monkeypatch.setattr(VisualClassifier, "__init__", wrong)
    with pytest.raises(GateError, match="float32 network differs from the trained model"):
        export(source, tmp_path / "x.capt", ExportOptions())


def test_a_check_finds_rows_and_factors_that_do_not_fit_the_answers(
    dac_bundle: Path, text_model: TunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Calibration(factors=tuple(factors_by_hand(text_model)[::-1]))
    monkeypatch.setattr(Bundle, "calibration_of", lambda *_: wrong)
    with pytest.raises(GateError, match="text embeddings are not those"):
        check_bundle(dac_bundle)


def test_a_graph_that_is_too_sure_gets_another_temperature_beside_its_factors(
    source: Source, text_model: TunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = VisualClassifier.lower

    def surer(self: VisualClassifier, dtype: torch.dtype) -> None:
        plain(self, dtype)
        self.weight *= 1.3

    monkeypatch.setattr(VisualClassifier, "lower", surer)
    options = ExportOptions(("fp16",), force=True)  # what a head does is put right twice
    out = export(source, tmp_path / "x.capt", options)
    loaded = Classifier.load(out)
    temperature = loaded.manifest.calibration["fp16"]["temperature"]
    assert temperature == pytest.approx(1.3 * source.temperature, rel=0.01)
    logits, _, embedding = loaded.backend.run(coloured_noise(50))
    rows = source.learner.backbone.scale / temperature * source.rows.rows.numpy()
    wanted = adjusted(embedding @ rows.T, factors_by_hand(text_model))
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@torch.no_grad()
def test_each_scope_has_the_factors_of_its_own_most_probable_classes(
    dac_bundle: Path, plain_bundle: Path, text_model: TunedModel, photos: Path
) -> None:
    report, without = (score_bundle(path, photos).report() for path in (dac_bundle, plain_bundle))
    dataset = read_dataset(photos, known_classes=text_model.class_names)
    items, config = dataset.items("test"), text_model.backbone.preprocess
    pixels = np.stack([preprocess(dataset.path(item), config) for item in items])
    embeddings = text_model.backbone.image_embeddings(torch.from_numpy(pixels))
    logits, labels = text_model.logits(embeddings).numpy(), np.array([i.label for i in items])
    factors = factors_by_hand(text_model)
    for scope, columns in (("base", [0, 1]), ("new", [2, 3]), ("all", [0, 1, 2, 3])):
        kept = np.isin(labels, columns)
        own = adjusted(logits[kept][:, columns], [factors[column] for column in columns])
        places = np.array([columns.index(label) for label in labels[kept]])
        assert report[scope] == pytest.approx(all_metrics(softmax(own), places), abs=1e-4)
        assert report[scope]["accuracy"] == without[scope]["accuracy"]
        assert report["uncalibrated"][scope] == pytest.approx(
            without["uncalibrated"][scope], abs=1e-4
        )
    assert report["base"] == pytest.approx(without["base"], abs=1e-5)
    assert report["new"]["nll"] != pytest.approx(without["new"]["nll"], abs=1e-3)
    for part in ("zero_shot", "confusion"):
        assert report[part] == without[part]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
@pytest.mark.parametrize(
    ("precision", "sm"),
    [("fp32", 80), ("fp16", 75), ("fp16", 120), ("int8", 89), ("bf16", 80), ("bf16", 120)],
)
def test_engines_are_built(dac_bundle: Path, precision: str, sm: int) -> None:
    from capt_deploy.backends.tensorrt.engine import build_engine

    graph = open_bundle(dac_bundle).graph(precision).onnx
    assert len(build_engine(graph, sm=sm)) > 10_000


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_there_is_nothing_left_to_simplify(dac_bundle: Path, precision: str) -> None:
    onnxslim = pytest.importorskip("onnxslim")
    model = onnx.load(dac_bundle / FILES[precision])
    onnx.checker.check_model(model, full_check=True)
    before = Counter(node.op_type for node in model.graph.node)
    after = Counter(node.op_type for node in onnxslim.slim(model).graph.node)
    assert set(before - after) <= {"Add", "Unsqueeze"}  # see test_engines
