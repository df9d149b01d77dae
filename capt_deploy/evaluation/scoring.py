"""Evaluate a bundle on labelled images, with the runtime that applications use."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capt_deploy.backends import Outputs, joined
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.confidence.distance_aware import undone
from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import BundleError, DataError
from capt_deploy.data.batches import preprocess_files
from capt_deploy.data.datasets import read_dataset
from capt_deploy.evaluation.evaluate import Pair, Report, Scores, evaluate
from capt_deploy.serving.classifier import Classifier, running_on


@dataclass(frozen=True)
class BundleScores:
    """What one graph of a bundle says of labelled images."""

    bundle: Bundle
    precision: str
    scores: Scores
    files: tuple[Path, ...]  # in the order of the scores
    skipped: tuple[tuple[str, str], ...]  # unreadable images, by path, and why

    @property
    def pairs(self) -> list[Pair]:
        """The confusions mined in training, as columns."""
        manifest = self.bundle.manifest
        index = {name: row for row, name in enumerate(manifest.class_names)}
        return [(index[p["true"]], index[p["predicted"]]) for p in manifest.confusion_pairs]

    def report(self, scope: str | None = None) -> Report:
        """Return the report of `capt-eval`; see `evaluate`."""
        manifest = self.bundle.manifest
        report = evaluate(self.scores, manifest.class_names, manifest.tuned, self.pairs, scope)
        report["skipped"] = [list(pair) for pair in self.skipped]
        return report


def evaluate_bundle(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    scope: str | None = None,
    class_names: Path | None = None,
    backend: str = "auto",
    precision: str | None = None,
) -> Report:
    """Return the report of `capt-eval` for a bundle.

    Raises:
        CaptError: bundle, data or backend cannot be used.
    """
    return score_bundle(path, data, split, class_names, backend, precision).report(scope)


def score_bundle(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    class_names: Path | None = None,
    backend: str = "auto",
    precision: str | None = None,
) -> BundleScores:
    """Ask one graph of a bundle about the images of a split.

    Raises:
        CaptError: bundle, data or backend cannot be used.
    """
    if Path(path).suffix == ".onnx":
        raise BundleError(f"{path}: a lone graph has no zero-shot rows; pass the whole bundle")
    bundle = open_bundle(path)
    zero_shot = bundle.text_embeddings().get("zero_shot")
    labels: list[int] = []
    parts: list[Outputs] = []
    files, skipped = [], []
    with Classifier.load(path, backend, precision) as classifier:
        say(running_on(classifier))
        names, manifest = classifier.class_names, classifier.manifest
        dataset = read_dataset(data, class_names, strict_names=False).aligned_to(names)
        items = {str(dataset.path(item)): item for item in dataset.items(split)}
        with progress(f"predicting {split} images", len(items), "images") as counter:
            for batch in preprocess_files(list(items), manifest.preprocess, 32):
                counter.advance(len(batch.files))
                read = [file for file in batch.files if file not in batch.errors]
                files += read
                labels += [items[file].label for file in read]
                skipped += [(items[file].path, why) for file, why in batch.errors.items()]
                if batch.pixels is not None:
                    parts.append(classifier.backend.run(batch.pixels))
        precision = classifier.precision
    if not labels:
        raise DataError(f"{data}: none of the {len(items)} images in split {split!r} is readable")
    calibration = manifest.calibration[precision]
    factors, found = bundle.factors(precision), joined(parts)
    scores = Scores(
        np.asarray(labels),
        found.logits if factors is None else undone(found.logits, factors),
        None if zero_shot is None else found.embedding @ zero_shot.T,
        calibration["temperature"],
        calibration.get("zero_shot_temperature", 1.0),
        factors,
        manifest.top_label,
        manifest.vector_scaling,
    )
    return BundleScores(bundle, precision, scores, tuple(map(Path, files)), tuple(skipped))
