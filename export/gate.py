"""Ask the torch model and a written graph about the same real images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.backends import Backend
from capt_deploy.batches import preprocess_files
from capt_deploy.console import progress, say
from capt_deploy.errors import DataError
from capt_deploy.files import sha256_file
from capt_deploy.gate import Answers
from capt_deploy.preprocess import PreprocessConfig
from capt_deploy.reference import Reference, patterns
from capt_train.calibration import match_temperature
from export.source import Photo, Source, spread

_PIXELS = 2**18  # at once: activations of more would outweigh the weights of a large ViT
_LARGEST_BATCH = 64
_FEW = 50


@dataclass(frozen=True)
class Question:
    """The images, and what the float32 torch model says of them."""

    photos: tuple[Photo, ...]  # only readable ones
    unreadable: int  # images that were to be asked about as well
    expected: Answers
    patterns: Answers  # to `patterns`, drawn at the model's size

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image; -1 where it is not known."""
        return np.array([photo.label for photo in self.photos])

    @property
    def reference(self) -> Reference:
        """What a bundle carries of it."""
        digests = tuple(sha256_file(photo.path) for photo in self.photos)
        return Reference(digests, self.labels, self.expected, self.patterns)


def ask_torch(source: Source, most_images: int) -> Question:
    """Return what the trained model says of the source's images.

    Raises:
        DataError: half of the images or more cannot be read.
    """
    photos = spread(source.gate_images, most_images)
    preprocess = source.learner.backbone.preprocess
    files = [str(photo.path) for photo in photos]
    readable: list[Photo] = []
    parts: list[Answers] = []
    with progress("asking the trained model", len(files), "images") as counter:
        of = dict(zip(files, photos, strict=True))
        for batch in preprocess_files(files, preprocess, _batch(preprocess)):
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
    drawn = patterns(preprocess.size)
    return Question(tuple(readable), lost, _joined(parts), _torch_answers(source, drawn))


def _batch(preprocess: PreprocessConfig) -> int:
    height, width = preprocess.size
    return max(1, min(_LARGEST_BATCH, _PIXELS // (height * width)))


@torch.no_grad()
def _torch_answers(source: Source, pixels: NDArray[np.uint8]) -> Answers:
    embedding = source.learner.image_embeddings(torch.from_numpy(pixels)).cpu()
    head = source.head
    logits = embedding @ head.weight.T + head.bias
    return Answers(logits.numpy(), logits.softmax(dim=1).numpy(), embedding.numpy())


def ask_backend(
    backend: Backend, preprocess: PreprocessConfig, files: Sequence[Path], label: str
) -> Answers:
    """Return what a graph says of image files, read by its own configuration.

    Raises:
        DataError: one of them cannot be read.
    """
    parts: list[Answers] = []
    names = [str(file) for file in files]
    with progress(label, len(names), "images") as counter:
        for batch in preprocess_files(names, preprocess, _batch(preprocess)):
            counter.advance(len(batch.files))
            if batch.pixels is None or batch.errors:
                raise DataError(f"cannot be read any more: {next(iter(batch.errors.values()))}")
            parts.append(Answers(*backend.run(batch.pixels)))
    return _joined(parts)


def temperature_factor(expected: Answers, found: Answers) -> float:
    """Return by how much a graph's temperature is to rise so that it is as sure as the model."""
    if not np.isfinite(found.logits).all():
        return 1.0  # the gate will say so
    return match_temperature(_tensor(found.logits), _tensor(expected.probabilities))


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _joined(parts: Sequence[Answers]) -> Answers:
    columns = zip(*((p.logits, p.probabilities, p.embedding) for p in parts), strict=True)
    return Answers(*(np.concatenate(column) for column in columns))
