"""Compare the graphs of an export with the torch model on real images."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.backends.base import Outputs, concatenate
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.core.console import counted, progress, say
from capt_deploy.core.errors import DataError, GateError
from capt_deploy.core.files import sha256_file
from capt_deploy.data.batches import frugal_batch, preprocess_files
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.check import run_on_files
from capt_deploy.verify.gate import GateResult, compare_outputs
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns
from capt_train.calibrate.temperature import match_temperature
from export.graph.lower import BF16, FP32
from export.precision.emulation import write_widened
from export.precision.trace import TracedGraph
from export.source.model import Source
from export.source.photos import Photo, spread_evenly

_FEW_IMAGES = 50
_WORTH_REFITTING = 1e-3  # of a temperature; less shows in no figure
_BUNDLE_IMAGES = 4  # on which the written bundle is run


@dataclass(frozen=True)
class GateInputs:
    """Images of the gate, and the outputs of the float32 torch model."""

    photos: tuple[Photo, ...]  # only readable ones
    unreadable: int  # further images, which could not be read
    expected: Outputs  # for `photos`
    patterns: Outputs  # for the patterns of `capt_deploy.verify.reference`

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the class of each image, (images,); -1 where it is not known."""
        return np.array([photo.label for photo in self.photos])

    @property
    def reference(self) -> ReferenceOutputs:
        """Return the form in which a bundle carries the outputs."""
        digests = tuple(sha256_file(photo.path) for photo in self.photos)
        return ReferenceOutputs(digests, self.labels, self.expected, self.patterns)


@dataclass(frozen=True)
class VerifiedGraph:
    """A graph with the temperature fitted to its precision, and the result of the gate."""

    traced: TracedGraph
    temperature: float
    outputs: Outputs
    result: GateResult


def run_torch_model(source: Source, most_images: int) -> GateInputs:
    """Run the trained model on the source's images and on the drawn patterns.

    Raises:
        DataError: half of the images or more cannot be read.
    """
    photos = spread_evenly(source.photos.gate, most_images)
    preprocess = source.learner.backbone.preprocess
    files = [str(photo.path) for photo in photos]
    photo_of = dict(zip(files, photos, strict=True))
    readable: list[Photo] = []
    parts: list[Outputs] = []
    with progress("running the trained model", len(files), "images") as counter:
        for batch in preprocess_files(files, preprocess, frugal_batch(preprocess)):
            counter.advance(len(batch.files))
            readable += [photo_of[file] for file in batch.files if file not in batch.errors]
            if batch.pixels is not None:
                parts.append(_torch_outputs(source, batch.pixels))
    lost = len(files) - len(readable)
    if lost >= len(readable):
        raise DataError(
            f"the export is checked on the run's own images, but {lost} of {len(files)} cannot be "
            f"read (first: {files[0] if files else 'none'}); pass their folder with --gate-data"
        )
    if lost:
        say(f"note: {lost} of {counted(len(files), 'image')} cannot be read")
    if len(readable) < _FEW_IMAGES:
        say(
            f"note: {counted(len(readable), 'image')} to check the export on; figures are uncertain"
        )
    drawn = _torch_outputs(source, draw_patterns(preprocess.size))
    return GateInputs(tuple(readable), lost, concatenate(parts), drawn)


@torch.no_grad()
def _torch_outputs(source: Source, pixels: NDArray[np.uint8]) -> Outputs:
    embedding = source.learner.image_embeddings(torch.from_numpy(pixels)).cpu()
    head = source.head
    logits = source.calibration.weigh((embedding @ head.weight.T + head.bias).numpy())
    logits = np.asarray(logits, np.float32)
    probabilities = source.calibration.probabilities(logits).astype(np.float32)
    return Outputs(logits, probabilities, embedding.numpy())


def verify_graph(
    source: Source, traced: TracedGraph, inputs: GateInputs, scratch: Path
) -> VerifiedGraph:
    """Run a graph on the gate's images, refit its temperature, and compare it with the model.

    Every graph but that of fp32 gets the temperature with which its probabilities are nearest to
    the trained model's; this takes no labels. `scratch` is a folder with room for the graph.
    """
    precision = traced.graph.precision
    outputs = _run_graph(source, traced, inputs, scratch)
    temperature, factor = source.temperature, 1.0
    if precision != FP32:
        factor = temperature_factor(inputs.expected, outputs)
    if abs(factor - 1) > _WORTH_REFITTING:
        temperature *= factor
        traced.graph.set_head(source.head.with_temperature_times(factor))
        outputs = _run_graph(source, traced, inputs, scratch)
    result = compare_outputs(precision, inputs.expected, outputs, inputs.labels, source.calibration)
    return VerifiedGraph(traced, temperature, outputs, result)


def _run_graph(source: Source, traced: TracedGraph, inputs: GateInputs, scratch: Path) -> Outputs:
    """Write the graph to disk and run it from there."""
    precision = traced.graph.precision
    with TemporaryDirectory(dir=scratch) as name:
        path = Path(name) / "model.onnx"
        traced.graph.write(path)
        if precision == BF16:  # the CPU has no kernels
            precision, narrow = "emulated", path
            path = path.with_name("widened.onnx")
            write_widened(narrow, path)
        files = [photo.path for photo in inputs.photos]
        backend = OnnxRuntime(path, precision, path.parent, frugal=True)
        label = f"running the {traced.graph.precision} graph"
        return run_on_files(backend, source.learner.backbone.preprocess, files, label)


def temperature_factor(expected: Outputs, outputs: Outputs) -> float:
    """Return the factor of the temperature that makes a graph as confident as the model."""
    if not np.isfinite(outputs.logits).all():
        return 1.0  # the gate reports it
    # Softmax of the logits: `probabilities` contain the map of the top label.
    return match_temperature(_tensor(outputs.logits), _tensor(expected.logits).softmax(dim=1))


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def verify_bundle(folder: Path, graphs: Mapping[str, VerifiedGraph], inputs: GateInputs) -> None:
    """Load a written bundle as an application does, and compare it with its graphs on a few images.

    Raises:
        GateError: the bundle gives other logits.
    """
    files = [photo.path for photo in inputs.photos[:_BUNDLE_IMAGES]]
    for precision, graph in graphs.items():
        if precision == BF16:  # the CPU has no kernels
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a forced bundle warns on loading
            classifier = Classifier.load(folder, "onnxruntime-cpu", precision)
        label = f"checking the written {precision} graph"
        outputs = run_on_files(classifier.backend, classifier.manifest.preprocess, files, label)
        expected = graph.outputs.logits[: len(files)]
        if not np.allclose(outputs.logits, expected, atol=1e-3, equal_nan=True):
            raise GateError(f"{precision}: the written bundle gives other logits than its graph")
