"""Run the export's gate again, on any machine: a bundle carries what its graphs have to say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Backend, Outputs, joined
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.confidence.distance_aware import undone
from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import DataError, GateError, UnavailableError
from capt_deploy.core.files import expand_home
from capt_deploy.data.batches import frugal_batch, preprocess_files
from capt_deploy.data.preprocess import PreprocessConfig
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.gate import GateResult, compare, gate_table
from capt_deploy.verify.reference import Reference, chosen, patterns

_ROWS = 1e-3  # by how much logits of the rows for tools may differ


def check_bundle(
    path: str | Path, images: str | Path | None = None, backend: str = "auto"
) -> dict[str, Any]:
    """Ask each graph of a bundle what the trained model was asked when it was exported.

    Args:
        path: the bundle.
        images: a folder below which the images of the export's gate lie; they are known by their
            hashes. Without it the graphs are asked about drawn patterns alone.
        backend: one of `capt_deploy.backends.NAMES`.

    Returns:
        By precision, for `patterns` and `images`, what `report.json` holds of the gate; for a
        graph that cannot run here, `not_checked` with the reason.

    Raises:
        GateError: a graph does not say what the trained model said, or the rows for tools do not.
        UnavailableError: none of the graphs can run here.
        CaptError: bundle, images or backend cannot be used.
    """
    bundle = open_bundle(path)
    _check_files(bundle)
    reference = Reference.of(bundle)
    _check_rows(bundle, reference)
    found = {} if images is None else reference.find(expand_home(images))
    results: dict[str, GateResult] = {}
    report: dict[str, Any] = {}
    for precision in bundle.manifest.graphs:
        try:
            classifier = Classifier.load(path, backend, precision)
        except UnavailableError as cause:
            say(f"{precision}: not checked: {cause}")
            report[precision] = {"not_checked": str(cause)}
            continue
        with classifier:
            own = _check(classifier, reference, found, bundle.factors(precision))
        results |= {f"{precision}, {kind}": result for kind, result in own.items()}
        report[precision] = {kind: result.to_dict() for kind, result in own.items()}
    if not results:
        raise UnavailableError(f"{path}: none of its graphs can run here; nothing was checked")
    say(gate_table(results))
    if failed := [f"{name}: {', '.join(r.failures)}" for name, r in results.items() if r.failures]:
        raise GateError(f"{path} does not say what the trained model said: {'; '.join(failed)}")
    return report


def _check_files(bundle: Bundle) -> None:
    """Make sure that files are as they were exported; a graph's own are checked on loading."""
    graphs = bundle.manifest.graphs.values()
    texts = bundle.manifest.open_vocabulary
    large = texts.weights if texts is not None else None
    for name in {*bundle.manifest.files} - {own for g in graphs for own in (g.file, g.weights)}:
        if name == large:
            bundle.folder_of(name)  # hashes it without holding it in memory
        else:
            bundle.read(name)


def _check_rows(bundle: Bundle, reference: Reference) -> None:
    """Make sure that the rows for tools give the reference's logits."""
    rows = bundle.text_embeddings()
    first = next(iter(bundle.manifest.graphs))
    asked = reference.patterns
    logits = asked.embedding @ rows["text_embeddings"].T + rows["bias"]
    factors = bundle.factors(first)
    wanted = asked.logits if factors is None else undone(asked.logits, factors)
    # The rows have the first graph's temperature, the reference that of float32.
    factor = float((logits * wanted).sum() / (logits * logits).sum())
    if not np.abs(factor * logits - wanted).max() <= _ROWS:
        raise GateError(f"{bundle.path}: its text embeddings are not those of its {first} graph")


def _check(
    classifier: Classifier,
    reference: Reference,
    found: dict[int, Path],
    factors: NDArray[np.float32] | None,
) -> dict[str, GateResult]:
    precision, preprocess = classifier.precision, classifier.manifest.preprocess
    drawn = classifier.backend.run(patterns(preprocess.size))
    unknown = np.full(len(drawn.logits), -1)
    results = {"patterns": compare(precision, reference.patterns, drawn, unknown, factors)}
    if found:
        places = list(found)
        expected = chosen(reference.images, places)
        label = f"asking the {precision} graph"
        answers = ask_backend(classifier.backend, preprocess, list(found.values()), label)
        labels = reference.labels[places]
        results["images"] = compare(precision, expected, answers, labels, factors)
    return results


def ask_backend(
    backend: Backend, preprocess: PreprocessConfig, files: Sequence[Path], label: str
) -> Outputs:
    """Return what a graph says of image files, read by its own configuration.

    Raises:
        DataError: one of them cannot be read.
    """
    parts: list[Outputs] = []
    names = [str(file) for file in files]
    with progress(label, len(names), "images") as counter:
        for batch in preprocess_files(names, preprocess, frugal_batch(preprocess)):
            counter.advance(len(batch.files))
            if batch.pixels is None or batch.errors:
                raise DataError(f"cannot be read any more: {next(iter(batch.errors.values()))}")
            parts.append(backend.run(batch.pixels))
    return joined(parts)
