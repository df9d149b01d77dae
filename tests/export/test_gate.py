import dataclasses
import shutil

import onnx
import pytest
from onnx import numpy_helper

from capt_deploy.backends import create
from capt_deploy.classifier import Classifier
from capt_deploy.errors import DataError
from capt_train.run import load_run
from export.gate import run_gate


@pytest.fixture(scope="module")
def model(tuned_run):
    return load_run(tuned_run)


@pytest.fixture(scope="module")
def images(photos):
    return sorted((photos / "val").rglob("*.png"))


def classifier_with(bundle, change):
    """Load the bundle's graph after `change` has been applied to it."""
    graph = onnx.load(bundle / "model.onnx")
    change(graph.graph)
    loaded = Classifier.load(bundle)
    return Classifier(loaded.manifest, create("auto", graph.SerializeToString(), "fp32"), "fp32")


def edit(graph, name, function):
    (weight,) = [w for w in graph.initializer if w.name == name]
    array = function(numpy_helper.to_array(weight).copy())
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def test_a_faithful_export_passes(model, bundle, images):
    result = run_gate(model, Classifier.load(bundle), images)
    assert result.images == len(images)
    assert result.failures == []
    assert result.to_dict()["passed"] is True


def changed_weight(graph):
    def change(array):
        array[0] += 0.05
        return array

    edit(graph, "visual.proj", change)


def wrong_mean(graph):
    # as if the mean that was folded into the first convolution were 0.02 too large
    (kernel,) = [w for w in graph.initializer if w.name == "visual.conv1.weight"]
    shift = 0.02 * 255 * numpy_helper.to_array(kernel).sum(axis=(1, 2, 3))
    edit(graph, "visual.conv1.bias", lambda array: array - shift)


def swapped_classes(graph):
    edit(graph, "weight", lambda array: array[[1, 0, 2, 3]])


def not_a_number(graph):
    edit(graph, "visual.proj", lambda array: array * float("nan"))


@pytest.mark.parametrize("change", [changed_weight, wrong_mean, swapped_classes, not_a_number])
def test_a_broken_export_is_caught(model, bundle, images, change):
    result = run_gate(model, classifier_with(bundle, change), images)
    assert result.failures
    assert result.to_dict()["passed"] is False


def test_another_temperature_is_caught(model, bundle, images):
    fitted = dataclasses.replace(model.fitted, temperature=model.fitted.temperature * 1.01)
    colder = dataclasses.replace(model, fitted=fitted)
    assert run_gate(colder, Classifier.load(bundle), images).failures


def test_unreadable_images_are_left_out_but_not_all_of_them(model, bundle, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    classifier = Classifier.load(bundle)
    assert run_gate(model, classifier, [broken, *images[:3]]).images == 3
    with pytest.raises(DataError, match="--gate-data"):
        run_gate(model, classifier, [broken])
    with pytest.raises(DataError, match="none"):
        run_gate(model, classifier, [])


def test_the_gate_uses_the_bundles_own_preprocessing(model, bundle, images, tmp_path):
    # a manifest with another size must not pass on the strength of the model's own pixels
    copy = tmp_path / "copy.capt"
    shutil.copytree(bundle, copy)
    loaded = Classifier.load(copy)
    other = dataclasses.replace(loaded.manifest.preprocess, interpolation="bilinear")
    manifest = dataclasses.replace(loaded.manifest, preprocess=other)
    changed = Classifier(manifest, loaded.backend, "fp32")
    assert run_gate(model, changed, images).failures
