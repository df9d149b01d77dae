"""Evaluate a bundle on labelled images, with the runtime that applications use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import BundleError, DataError, UnavailableError
from capt_deploy.data.batches import preprocess_files
from capt_deploy.data.datasets import read_dataset
from capt_deploy.evaluation.evaluate import Evaluation, Scores
from capt_deploy.evaluation.summary import NO_ZERO_SHOT
from capt_deploy.serving.classifier import Classifier

_BATCH = 32


def score_bundle(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    class_names: Path | None = None,
    backend: str = "auto",
    precision: str | None = None,
) -> Evaluation:
    """Return the scores of one graph of a bundle for the images of a split.

    Raises:
        CaptError: bundle, data or backend cannot be used.
    """
    if Path(path).suffix == ".onnx":
        raise BundleError(f"{path}: expected a bundle, came a graph alone; pass the whole bundle")
    bundle = open_bundle(path)
    zero_shot = bundle.text_embeddings().get("zero_shot")
    labels: list[int] = []
    logits: list[NDArray[np.float32]] = []
    embeddings: list[NDArray[np.float32]] = []
    files: list[Path] = []
    with Classifier.load(path, backend, precision) as classifier:
        say(classifier.running_on)
        manifest, precision = classifier.manifest, classifier.precision
        dataset = read_dataset(data, class_names, classifier.class_names)
        skipped = [(file.path, file.reason) for file in dataset.skipped]
        items = {str(dataset.path(item)): item for item in dataset.items(split)}
        with progress(f"predicting {split} images", len(items), "images") as counter:
            for batch in preprocess_files(list(items), manifest.preprocess, _BATCH):
                counter.advance(len(batch.files))
                readable = [file for file in batch.files if file not in batch.errors]
                files += map(Path, readable)
                labels += [items[file].label for file in readable]
                skipped += [(items[file].path, why) for file, why in batch.errors.items()]
                if batch.pixels is not None:
                    outputs = classifier.backend.run(batch.pixels)
                    logits.append(outputs.logits)
                    embeddings.append(outputs.embedding)
    if not labels:
        raise DataError(f"{data}: none of the {len(items)} images in split {split!r} is readable")
    calibration, tuned = bundle.calibration_of(precision), np.concatenate(logits)
    logits.clear()  # of many images and classes, which need not be in memory twice
    scores = Scores(
        np.asarray(labels),
        calibration.unweigh(tuned),
        None if zero_shot is None else np.concatenate(embeddings) @ zero_shot.T,
        calibration,
        manifest.calibration[precision].get("zero_shot_temperature", 1.0),
    )
    columns = {name: column for column, name in enumerate(manifest.class_names)}
    return Evaluation(
        manifest.class_names,
        manifest.tuned,
        [(columns[pair["true"]], columns[pair["predicted"]]) for pair in manifest.confusion_pairs],
        files,
        {f"exported {precision}": scores},
        skipped,
        {
            "bundle": bundle.path.name,
            **manifest.training,
            "calibration": {name: dict(values) for name, values in manifest.calibration.items()},
        },
        () if zero_shot is not None else (NO_ZERO_SHOT,),
        bundle.decisions(),
    )


def score_graphs(
    path: Path, data: Path, split: str, class_names: Path | None, backend: str
) -> Evaluation:
    """Return the scores of all graphs of a bundle; a note names each that cannot run here.

    Raises:
        UnavailableError: none of them can run here.
    """
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    for precision in open_bundle(path).manifest.graphs:
        try:
            evaluations.append(score_bundle(path, data, split, class_names, backend, precision))
        except UnavailableError as cause:
            notes.append(f"the {precision} graph cannot run here: {cause}")
            say(f"note: {notes[-1]}")
    if not evaluations:
        raise UnavailableError(f"{path}: none of its graphs can run here: {'; '.join(notes)}")
    first = evaluations[0]
    scores: dict[str, Scores] = {}
    for evaluation in evaluations:
        scores.update(evaluation.scores)
    return replace(first, scores=scores, notes=(*notes, *first.notes))
