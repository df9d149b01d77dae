"""Run the export's gate again, on any machine, against the reference in the bundle."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from capt_deploy.backends.base import Backend, Outputs, concatenate
from capt_deploy.backends.choice import first_that_works
from capt_deploy.backends.spec import BackendSpec, find_backends
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import DataError, GateError, UnavailableError
from capt_deploy.core.files import expand_home
from capt_deploy.data.batches import frugal_batch, preprocess_files
from capt_deploy.data.preprocess import PreprocessConfig
from capt_deploy.verify.gate import GateResult, compare_outputs, gate_table
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns

_ROW_LIMIT = 1e-3  # by how much logits of the class rows may differ


def check_bundle(
    path: str | Path, images: str | Path | None = None, backend: str = "auto"
) -> dict[str, Any]:
    """Compare each graph of a bundle with the trained model's answers in its reference.

    Args:
        path: the bundle.
        images: a folder below which images of the export's gate lie; they are recognised by their
            hashes. Without it only the drawn patterns are compared.
        backend: one of `capt_deploy.backends.spec.backend_names()`.

    Returns:
        By precision, for `patterns` and `images`, the gate of `report.json`; for a graph that
        cannot run here, `not_checked` with the reason.

    Raises:
        GateError: a graph or the class rows differ from the trained model.
        UnavailableError: none of the graphs can run here.
        CaptError: bundle, images or backend cannot be used.
    """
    specs = find_backends(backend)
    bundle = open_bundle(path)
    _check_files(bundle)
    reference = ReferenceOutputs.from_bundle(bundle)
    _check_rows(bundle, reference.patterns)
    files = {} if images is None else reference.find(expand_home(images))
    results: dict[str, GateResult] = {}
    report: dict[str, Any] = {}
    for precision in bundle.manifest.graphs:
        try:
            engine = _open(specs, bundle.graph(precision))
        except UnavailableError as cause:
            say(f"{precision}: not checked: {cause}")
            report[precision] = {"not_checked": str(cause)}
            continue
        with closing(engine):
            checked = _check_graph(engine, precision, bundle, reference, files)
        results |= {f"{precision}, {kind}": result for kind, result in checked.items()}
        report[precision] = {kind: result.to_dict() for kind, result in checked.items()}
    if not results:
        raise UnavailableError(f"{path}: none of its graphs can run here; nothing was checked")
    say(gate_table(results))
    if failed := [f"{name}: {', '.join(r.failures)}" for name, r in results.items() if r.failures]:
        raise GateError(f"{path} differs from the trained model: {'; '.join(failed)}")
    return report


def _check_files(bundle: Bundle) -> None:
    """Check the hashes of all files except the graphs, which are checked on loading."""
    graphs = bundle.manifest.graphs.values()
    texts = bundle.manifest.open_vocabulary
    for name in {*bundle.manifest.files} - {file for g in graphs for file in (g.file, g.weights)}:
        if texts is not None and name == texts.weights:
            bundle.copy(name, Path(os.devnull))  # too large to be held in memory
        else:
            bundle.read(name)


def _check_rows(bundle: Bundle, patterns: Outputs) -> None:
    """Check that the class rows give the logits of the reference."""
    rows = bundle.text_embeddings()
    first = next(iter(bundle.manifest.graphs))
    logits = patterns.embedding @ rows["text_embeddings"].T + rows["bias"]
    expected = bundle.calibration_of(first).unweigh(patterns.logits)
    # The rows have the temperature of the first graph, the reference that of float32.
    ratio = float((logits * expected).sum() / (logits * logits).sum())
    if not np.abs(ratio * logits - expected).max() <= _ROW_LIMIT:
        raise GateError(f"{bundle.path}: its text embeddings are not those of its {first} graph")


def _open(specs: Sequence[BackendSpec], graph: StoredGraph) -> Backend:
    def start(spec: BackendSpec) -> Backend:
        return spec.open(graph.onnx, graph.precision, graph.weights_folder)

    return first_that_works(specs, start)[0]


def _check_graph(
    engine: Backend,
    precision: str,
    bundle: Bundle,
    reference: ReferenceOutputs,
    files: dict[int, Path],
) -> dict[str, GateResult]:
    preprocess, calibration = bundle.manifest.preprocess, bundle.calibration_of(precision)
    outputs = engine.run(draw_patterns(preprocess.size))
    unknown = np.full(len(outputs.logits), -1)
    results = {
        "patterns": compare_outputs(precision, reference.patterns, outputs, unknown, calibration)
    }
    if files:
        rows = [*files]
        expected = Outputs(*(part[rows] for part in reference.images))
        label = f"asking the {precision} graph"
        outputs = run_on_files(engine, preprocess, [*files.values()], label)
        labels = reference.labels[rows]
        results["images"] = compare_outputs(precision, expected, outputs, labels, calibration)
    return results


def run_on_files(
    backend: Backend, preprocess: PreprocessConfig, files: Sequence[Path], label: str
) -> Outputs:
    """Return the outputs of a graph for image files; `label` is shown with the progress.

    Raises:
        DataError: a file cannot be read.
    """
    parts: list[Outputs] = []
    names = [str(file) for file in files]
    with progress(label, len(names), "images") as counter:
        for batch in preprocess_files(names, preprocess, frugal_batch(preprocess)):
            counter.advance(len(batch.files))
            if batch.pixels is None or batch.errors:
                raise DataError(f"cannot be read any more: {next(iter(batch.errors.values()))}")
            parts.append(backend.run(batch.pixels))
    return concatenate(parts)
