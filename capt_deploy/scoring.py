"""Evaluate a bundle on labelled images, with the runtime that applications use."""

from pathlib import Path

import numpy as np

from capt_deploy.backends import Outputs, joined
from capt_deploy.batches import preprocess_files
from capt_deploy.bundle import Bundle, open_bundle
from capt_deploy.classifier import Classifier, running_on
from capt_deploy.console import progress, say
from capt_deploy.datasets import read_dataset
from capt_deploy.distance_aware import undone
from capt_deploy.errors import BundleError, DataError
from capt_deploy.evaluation import Pair, Report, Scores, evaluate


def evaluate_bundle(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    scope: str | None = None,
    class_names: Path | None = None,
    backend: str = "auto",
) -> Report:
    """Return the report of `capt-eval` for a bundle.

    Raises:
        CaptError: bundle, data or backend cannot be used.
    """
    if Path(path).suffix == ".onnx":
        raise BundleError(f"{path}: a lone graph has no zero-shot rows; pass the whole bundle")
    bundle = open_bundle(path)
    classifier = Classifier.load(path, backend)
    say(running_on(classifier))
    dataset = read_dataset(data, class_names, strict_names=False).aligned_to(classifier.class_names)
    items = {str(dataset.path(item)): item for item in dataset.items(split)}
    zero_shot = bundle.text_embeddings().get("zero_shot")
    labels: list[int] = []
    parts: list[Outputs] = []
    skipped = []
    with progress(f"predicting {split} images", len(items), "images") as counter:
        for batch in preprocess_files(list(items), classifier.manifest.preprocess, 32):
            counter.advance(len(batch.files))
            labels += [items[file].label for file in batch.files if file not in batch.errors]
            skipped += [[items[file].path, reason] for file, reason in batch.errors.items()]
            if batch.pixels is not None:
                parts.append(classifier.backend.run(batch.pixels))
    if not labels:
        raise DataError(f"{data}: none of the {len(items)} images in split {split!r} is readable")
    manifest = bundle.manifest
    calibration = manifest.calibration[classifier.precision]
    factors, found = bundle.factors(classifier.precision), joined(parts)
    scores = Scores(
        np.asarray(labels),
        found.logits if factors is None else undone(found.logits, factors),
        None if zero_shot is None else found.embedding @ zero_shot.T,
        calibration["temperature"],
        calibration.get("zero_shot_temperature", 1.0),
        factors,
    )
    report = evaluate(scores, manifest.class_names, manifest.tuned, _pairs(bundle), scope)
    report["skipped"] = skipped
    return report


def _pairs(bundle: Bundle) -> list[Pair]:
    index = {name: row for row, name in enumerate(bundle.manifest.class_names)}
    return [(index[p["true"]], index[p["predicted"]]) for p in bundle.manifest.confusion_pairs]
