"""The Python model is run for real, but for one module that exists only inside Triton.

`triton_python_backend_utils` is a stub here, with the few names that the model uses.
"""

import importlib.util
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig

from capt_deploy.bundle.read import open_bundle
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from export.triton.repository import write_triton

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.capt"
PHOTOS = sorted((GOLDEN.parent / "photos").rglob("*.png"))


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class TritonError(Exception):
    INVALID_ARG = 3

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


class Response:
    def __init__(self, output_tensors, error=None):
        self.tensors, self.error = {t.name: t.as_numpy() for t in output_tensors}, error


def stub():
    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
    module.get_input_tensor_by_name = lambda request, name: request[name]
    return module


def encoded(*files):
    """A request as Triton passes it on: bytes in an array of objects, (batch, 1)."""
    array = np.empty((len(files), 1), dtype=object)
    array[:, 0] = files
    return {"image": Tensor("image", array)}


def jpeg(seed, size=(37, 23), **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def sideways(seed):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    return jpeg(seed, exif=exif)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    shutil.copytree(GOLDEN, folder / "pets.capt")
    return write_triton(open_bundle(folder / "pets.capt"), folder / "models")


def read_config(repository, model):
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


@pytest.fixture(scope="module")
def model(repository):
    return start(repository)


def start(repository):
    """The model.py of the repository, started as the server starts it."""
    path = repository / "pets_preprocess" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("triton_model", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", stub())
        spec.loader.exec_module(module)
    # Triton hands the configuration over as JSON, with the schema's own field names.
    config = json_format.MessageToDict(
        read_config(repository, "pets_preprocess"), preserving_proto_field_name=True
    )
    started = module.TritonPythonModel()
    started.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU"})
    return started


@pytest.mark.parametrize("files", [[jpeg(1)], [sideways(2), jpeg(3, (16, 90)), jpeg(4, (5, 4))]])
def test_pixels_are_those_of_the_runtime_bit_for_bit(model, files):
    config = open_bundle(GOLDEN).manifest.preprocess
    (response,) = model.execute([encoded(*files)])
    assert response.error is None
    pixels = response.tensors["images"]
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.stack([preprocess(file, config) for file in files]))


@pytest.mark.parametrize("mode", ["squash", "longest"])
def test_the_bundle_says_how_to_preprocess(tmp_path, mode):
    bundle = open_bundle(shutil.copytree(GOLDEN, tmp_path / "pets.capt"))
    own = bundle.manifest.preprocess
    other = replace(own, resize_mode=mode, interpolation="bilinear", fill_color=7)
    other_bundle = replace(bundle, manifest=replace(bundle.manifest, preprocess=other))
    started = start(write_triton(other_bundle, tmp_path / "models"))
    (response,) = started.execute([encoded(jpeg(12))])
    (pixels,) = response.tensors["images"]
    assert np.array_equal(pixels, preprocess(jpeg(12), other))
    assert not np.array_equal(pixels, preprocess(jpeg(12), own))


def test_they_are_what_its_configuration_promises(model, repository):
    (output,) = read_config(repository, "pets_preprocess").output
    (response,) = model.execute([encoded(jpeg(5), jpeg(6))])
    assert set(response.tensors) == {output.name}
    assert response.tensors[output.name].shape == (2, *output.dims)


@pytest.mark.parametrize("broken", [b"", b"no image", jpeg(7)[:300], b"/etc/hostname"])
def test_a_broken_image_fails_its_own_request_alone(model, broken):
    good, bad, other = model.execute(
        [encoded(jpeg(8)), encoded(jpeg(9), broken), encoded(jpeg(10))]
    )
    assert good.error is None
    assert other.error is None
    assert len(good.tensors["images"]) == len(other.tensors["images"]) == 1
    assert bad.tensors == {}
    assert str(bad.error).startswith("image 2 of 2: ")
    assert bad.error.code == TritonError.INVALID_ARG


def run_ensemble(repository, model, files):
    """Do what the ensemble's configuration says, step by step, as Triton's scheduler does."""
    known = {"image": encoded(*files)["image"].as_numpy()}
    for step in read_config(repository, "pets").ensemble_scheduling.step:
        given = {own: known[tensor] for own, tensor in step.input_map.items()}
        if step.model_name == "pets_preprocess":
            request = {name: Tensor(name, array) for name, array in given.items()}
            (response,) = model.execute([request])
            made = response.tensors
        else:
            path = repository / step.model_name / "1" / "model.onnx"
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            made = dict(zip(names, session.run(names, given), strict=True))
        known |= {tensor: made[own] for own, tensor in step.output_map.items()}
    return {output.name: known[output.name] for output in read_config(repository, "pets").output}


def test_the_whole_ensemble_says_what_the_classifier_says(repository, model):
    files = [photo.read_bytes() for photo in PHOTOS] + [jpeg(11)]
    outputs = run_ensemble(repository, model, files)
    expected = Classifier.load(GOLDEN).predict(files)
    assert len(expected) == 4
    probabilities = np.stack([prediction.probabilities for prediction in expected])
    assert np.abs(outputs["probabilities"] - probabilities).max() < 1e-6
    labels = (repository / "pets" / "labels.txt").read_text().splitlines()
    best = outputs["probabilities"].argmax(axis=1)
    assert [labels[index] for index in best] == [prediction.label for prediction in expected]
    assert np.allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, atol=1e-5)
