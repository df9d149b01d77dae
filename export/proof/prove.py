"""Write a graph, ask it, and set its temperature; ask the finished bundle once more."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from capt_deploy.backends.base import Outputs
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.core.errors import GateError
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.check import run_on_files
from capt_deploy.verify.gate import GateResult, compare_outputs
from export.graph.lower import BF16, FP32
from export.precision.emulation import write_widened
from export.precision.trace import Traced
from export.proof.question import Question, temperature_factor
from export.source.model import Source

_WORTH_REFITTING = 1e-3  # of a temperature; less shows in no figure
_LAST_LOOK = 4  # images that the finished bundle is asked about


@dataclass(frozen=True)
class Proven:
    """A graph, and what asking it has shown."""

    traced: Traced
    path: Path  # of its file
    temperature: float
    answers: Outputs
    result: GateResult


def prove(source: Source, traced: Traced, question: Question, path: Path) -> Proven:
    """Write a graph, ask it, and let it be as sure of itself as the trained model."""
    precision = traced.graph.precision
    answers = _ask(traced, path, source, question)
    temperature, factor = source.temperature, 1.0
    if precision != FP32:
        factor = temperature_factor(question.expected, answers)
    if abs(factor - 1) > _WORTH_REFITTING:
        temperature *= factor
        traced.graph.set_head(source.head.cooled(factor))
        answers = _ask(traced, path, source, question)
    result = compare_outputs(
        precision, question.expected, answers, question.labels, source.calibration
    )
    return Proven(traced, path, temperature, answers, result)


def _ask(traced: Traced, path: Path, source: Source, question: Question) -> Outputs:
    """Write the graph and ask what was written."""
    precision = traced.graph.precision
    traced.graph.write(path)
    folder = path.parent if traced.graph.external else None
    files = [photo.path for photo in question.photos]
    preprocess = source.learner.backbone.preprocess
    label = f"asking the {precision} graph"
    if precision != BF16:
        backend = OnnxRuntime(path, precision, folder, frugal=True)
        return run_on_files(backend, preprocess, files, label)
    with TemporaryDirectory(dir=path.parent) as name:
        wide = Path(name) / path.name
        write_widened(path, wide)
        backend = OnnxRuntime(wide, "emulated", wide.parent, frugal=True)
        return run_on_files(backend, preprocess, files, label)


def last_look(folder: Path, proven: Mapping[str, Proven], question: Question) -> None:
    """Load the finished bundle as an application does, and ask it once more."""
    files = [photo.path for photo in question.photos[:_LAST_LOOK]]
    for precision, own in proven.items():
        if precision == BF16:  # the CPU cannot
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it has failed was said already
            loaded = Classifier.load(folder, "onnxruntime-cpu", precision)
        found = run_on_files(loaded.backend, loaded.manifest.preprocess, files, "last look")
        if not np.allclose(
            found.logits, own.answers.logits[: len(files)], atol=1e-3, equal_nan=True
        ):
            raise GateError(f"{precision}: the bundle does not say what its graph said")
