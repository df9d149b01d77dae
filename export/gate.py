"""Prove on real images that a written bundle says what the trained model says."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capt_deploy.batches import preprocess_files
from capt_deploy.classifier import Classifier
from capt_deploy.console import progress
from capt_deploy.errors import DataError
from capt_train.run import TunedModel

MOST_IMAGES = 256
MAX_LOGIT_DIFFERENCE = 1e-4  # of float32, in scaled logits (METHOD 9)
MAX_PROBABILITY_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class GateResult:
    """Differences between the torch model and the graph as a runtime loads it."""

    images: int
    top1_agreement: float  # share of images
    max_logit_difference: float
    mean_logit_difference: float
    max_probability_difference: float

    @property
    def failures(self) -> list[str]:
        """What is over its limit; empty when the gate passes."""
        checks = [
            (self.top1_agreement < 1, f"top-1 agreement {self.top1_agreement:.4f}, expected 1"),
            (
                not self.max_logit_difference <= MAX_LOGIT_DIFFERENCE,  # also catches NaN
                f"max |Δlogit| {self.max_logit_difference:.2e}, limit {MAX_LOGIT_DIFFERENCE:.0e}",
            ),
            (
                not self.max_probability_difference <= MAX_PROBABILITY_DIFFERENCE,
                f"max |Δp| {self.max_probability_difference:.2e}, "
                f"limit {MAX_PROBABILITY_DIFFERENCE:.0e}",
            ),
        ]
        return [text for failed, text in checks if failed]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, limits included."""
        return {
            **asdict(self),
            "limits": {
                "top1_agreement": 1.0,
                "max_logit_difference": MAX_LOGIT_DIFFERENCE,
                "max_probability_difference": MAX_PROBABILITY_DIFFERENCE,
            },
            "passed": not self.failures,
        }


def run_gate(model: TunedModel, classifier: Classifier, images: Sequence[Path]) -> GateResult:
    """Compare both on the same image files, each with its own way from pixels to probabilities.

    Raises:
        DataError: none of the images can be read.
    """
    expected, found = [], []
    # Spread over the list, which is sorted by class.
    chosen = np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).astype(int)
    files = [str(images[index]) for index in chosen]
    # Each side reads the files by its own configuration, so that a wrong one shows as well.
    reference_batches = preprocess_files(files, model.backbone.preprocess, batch_size=32)
    own_batches = preprocess_files(files, classifier.manifest.preprocess, batch_size=32)
    with progress("checking", len(files), "images") as counter:
        for batch, own in zip(reference_batches, own_batches, strict=True):
            counter.advance(len(batch.files))
            if batch.pixels is None or own.pixels is None:
                continue
            embeddings = model.learner.image_embeddings(torch.from_numpy(batch.pixels))
            expected.append(model.logits(embeddings).cpu())
            found.append(classifier.backend.run(own.pixels))
    if not expected:
        raise DataError(
            f"the export is checked on the run's own images, but none of {len(files)} can be "
            f"read (first: {files[0] if files else 'none'}); pass their folder with --gate-data"
        )
    reference = torch.cat(expected)
    probabilities = reference.softmax(dim=1).numpy()
    logits = np.concatenate([outputs.logits for outputs in found])
    difference = np.abs(logits - reference.numpy())
    own_probabilities = np.concatenate([outputs.probabilities for outputs in found])
    return GateResult(
        images=len(logits),
        top1_agreement=float(np.mean(logits.argmax(axis=1) == reference.numpy().argmax(axis=1))),
        max_logit_difference=float(difference.max()),
        mean_logit_difference=float(difference.mean()),
        max_probability_difference=float(np.abs(own_probabilities - probabilities).max()),
    )
