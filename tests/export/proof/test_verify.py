"""Broken exports must be caught, and sound ones pass, on real graphs."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.confidence.calibration import Calibration
from capt_deploy.core.errors import DataError, GateError
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.check import run_on_files
from capt_deploy.verify.gate import compare_outputs
from capt_train.run.folder import load_run
from export.graph.visual import VisualClassifier
from export.precision.trace import trace_precision
from export.proof.verify import run_torch_model, temperature_factor
from export.source.model import source_from_run
from export.source.photos import Photo


@pytest.fixture(scope="module")
def source(tuned_run):
    return source_from_run(load_run(tuned_run))


@pytest.fixture(scope="module")
def inputs(source):
    return run_torch_model(source, most_images=100)


def judge(question, backend, preprocess, precision="fp32"):
    files = [photo.path for photo in question.photos]
    answers = run_on_files(backend, preprocess, files, "asking")
    return compare_outputs(precision, question.expected, answers, question.labels)


def changed(bundle, change, name="model.onnx"):
    """Return a backend of the bundle's graph after `change` has been applied to it."""
    graph = onnx.load(bundle / name)
    change(graph.graph)
    return OnnxRuntime(graph.SerializeToString(), "fp32" if name == "model.onnx" else "fp16")


def edit(graph, name, function):
    (weight,) = [w for w in graph.initializer if w.name == name]
    array = function(numpy_helper.to_array(weight).copy())
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def test_a_faithful_export_passes(inputs, bundle):
    loaded = Classifier.load(bundle)
    result = judge(inputs, loaded.backend, loaded.manifest.preprocess)
    assert (result.images, result.labelled) == (8, 8)
    assert result.failures == []


def changed_weight(graph):
    def change(array):
        array[0] += 0.05
        return array

    edit(graph, "visual.proj", change)


def wrong_mean(graph):
    # as if the mean that was folded into the first convolution were 0.02 too large
    (kernel,) = [w for w in graph.initializer if w.name == "visual.conv1.weight"]
    half = kernel.data_type == onnx.TensorProto.FLOAT16
    total = numpy_helper.to_array(kernel).astype(np.float32).sum(axis=(1, 2, 3))
    shift = 0.02 * 255 * (total / 256 if half else total)
    edit(graph, "visual.conv1.bias", lambda array: (array - shift).astype(array.dtype))


def swapped_classes(graph):
    (head,) = [w.name for w in graph.initializer if list(w.dims) == [4, 32, 1, 1]]
    edit(graph, head, lambda array: array[[1, 0, 2, 3]])


def not_a_number(graph):
    edit(graph, "visual.proj", lambda array: array * array.dtype.type("nan"))


BROKEN = [changed_weight, wrong_mean, swapped_classes, not_a_number]


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_export_is_caught(inputs, bundle, change):
    preprocess = Classifier.load(bundle).manifest.preprocess
    result = judge(inputs, changed(bundle, change), preprocess)
    assert result.failures
    assert result.to_dict()["passed"] is False


# What little a small model says of a small fault, int8's rounding hides; see the last test.
LOWER = [("fp16", change) for change in BROKEN]
LOWER += [("int8", change) for change in (swapped_classes, not_a_number)]


@pytest.mark.parametrize(("precision", "change"), LOWER)
def test_the_wider_limits_of_lower_precision_catch_it_too(inputs, full_bundle, precision, change):
    preprocess = Classifier.load(full_bundle).manifest.preprocess
    backend = changed(full_bundle, change, f"model.{precision}.onnx")
    assert judge(inputs, backend, preprocess, precision).failures


def test_another_temperature_is_caught(source, bundle):
    colder = dataclasses.replace(source, calibration=Calibration(source.temperature * 1.01))
    loaded = Classifier.load(bundle)
    result = judge(run_torch_model(colder, 100), loaded.backend, loaded.manifest.preprocess)
    assert result.failures


def test_the_gate_reads_images_as_the_bundle_says(inputs, bundle):
    # a manifest with another filter must not pass on the strength of the model's own pixels
    loaded = Classifier.load(bundle)
    other = dataclasses.replace(loaded.manifest.preprocess, interpolation="bilinear")
    assert judge(inputs, loaded.backend, other).failures


def test_unreadable_images_are_left_out_but_not_all_of_them(source, tmp_path):
    broken = Photo(tmp_path / "broken.png")
    broken.path.write_bytes(b"nothing")

    def with_gate_images(*photos):
        chosen = dataclasses.replace(source.photos, gate=photos)
        return dataclasses.replace(source, photos=chosen)

    some = run_torch_model(with_gate_images(broken, *source.photos.gate[:3]), 100)
    assert (some.photos, some.unreadable) == (source.photos.gate[:3], 1)
    for images in ((broken, source.photos.gate[0]), (broken,), ()):
        with pytest.raises(DataError, match="--gate-data"):
            run_torch_model(with_gate_images(*images), 100)


def test_no_more_images_are_used_than_allowed(source):
    few = run_torch_model(source, most_images=3)
    assert len(few.photos) == 3
    assert {photo.label for photo in few.photos} == {0, 1}  # spread over the classes


def test_a_graph_that_is_surer_gets_a_higher_temperature(inputs):
    surer = inputs.expected._replace(logits=inputs.expected.logits * 1.25)
    assert temperature_factor(inputs.expected, surer) == pytest.approx(1.25, rel=1e-4)
    lost = surer._replace(logits=np.full_like(surer.logits, np.nan))
    assert temperature_factor(inputs.expected, lost) == 1.0


@pytest.mark.parametrize("fault", ["wrong mean", "changed weight"])
def test_a_network_that_is_wrong_is_caught_before_rounding_hides_it(source, fault, monkeypatch):
    expected = run_torch_model(source, 4).patterns
    made = VisualClassifier.__init__

    def wrong(self, *arguments, **options):
        made(self, *arguments, **options)
        kernel = self.visual.conv1.weight
        if fault == "wrong mean":
            self.visual.conv1.bias.data -= 0.002 * 255 * kernel.sum(dim=(1, 2, 3))
        else:
            kernel.data[0] *= 1.01

    traced = trace_precision(source, "int8", 20, expected)
    assert [graph.graph.precision for graph in traced] == ["int8", "int8-cpu"]
    monkeypatch.setattr(VisualClassifier, "__init__", wrong)
    with pytest.raises(GateError, match="float32 network differs from the trained model"):
        trace_precision(source, "int8", 20, expected)
