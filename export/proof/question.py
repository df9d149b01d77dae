"""Ask the torch model about real images; how sure a graph must be to be as sure as it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.backends.base import Outputs, concatenate
from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import sha256_file
from capt_deploy.data.batches import frugal_batch, preprocess_files
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns
from capt_train.calibrate.temperature import match_temperature
from export.source.model import Photo, Source, spread

_FEW = 50


@dataclass(frozen=True)
class Question:
    """The images, and what the float32 torch model says of them."""

    photos: tuple[Photo, ...]  # only readable ones
    unreadable: int  # images that were to be asked about as well
    expected: Outputs
    patterns: Outputs  # to `patterns`, drawn at the model's size

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image; -1 where it is not known."""
        return np.array([photo.label for photo in self.photos])

    @property
    def reference(self) -> ReferenceOutputs:
        """What a bundle carries of it."""
        digests = tuple(sha256_file(photo.path) for photo in self.photos)
        return ReferenceOutputs(digests, self.labels, self.expected, self.patterns)


def ask_torch(source: Source, most_images: int) -> Question:
    """Return what the trained model says of the source's images.

    Raises:
        DataError: half of the images or more cannot be read.
    """
    photos = spread(source.gate_images, most_images)
    preprocess = source.learner.backbone.preprocess
    files = [str(photo.path) for photo in photos]
    readable: list[Photo] = []
    parts: list[Outputs] = []
    with progress("asking the trained model", len(files), "images") as counter:
        of = dict(zip(files, photos, strict=True))
        for batch in preprocess_files(files, preprocess, frugal_batch(preprocess)):
            counter.advance(len(batch.files))
            readable += [of[file] for file in batch.files if file not in batch.errors]
            if batch.pixels is not None:
                parts.append(_torch_answers(source, batch.pixels))
    lost = len(files) - len(readable)
    if lost >= len(readable):
        raise DataError(
            f"the export is checked on the run's own images, but {lost} of {len(files)} cannot be "
            f"read (first: {files[0] if files else 'none'}); pass their folder with --gate-data"
        )
    if lost:
        say(f"note: {lost} of {len(files)} images of the check cannot be read")
    if len(readable) < _FEW:
        say(f"note: checked on no more than {len(readable)} images, which tell little")
    drawn = draw_patterns(preprocess.size)
    return Question(tuple(readable), lost, concatenate(parts), _torch_answers(source, drawn))


@torch.no_grad()
def _torch_answers(source: Source, pixels: NDArray[np.uint8]) -> Outputs:
    embedding = source.learner.image_embeddings(torch.from_numpy(pixels)).cpu()
    head = source.head
    logits = source.calibration.weigh((embedding @ head.weight.T + head.bias).numpy())
    logits = np.asarray(logits, np.float32)
    probabilities = source.calibration.probabilities(logits).astype(np.float32)
    return Outputs(logits, probabilities, embedding.numpy())


def temperature_factor(expected: Outputs, found: Outputs) -> float:
    """Return by how much a graph's temperature is to rise so that it is as sure as the model."""
    if not np.isfinite(found.logits).all():
        return 1.0  # the gate will say so
    # Not their probabilities, which the map of the top label is in.
    wanted = _tensor(expected.logits).softmax(dim=1)
    return match_temperature(_tensor(found.logits), wanted)


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
