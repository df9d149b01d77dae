"""Image files in batches of pixels, where one broken file spoils only its own row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capt_deploy.errors import ImageError
from capt_deploy.preprocess import PreprocessConfig, preprocess

_FRUGAL_PIXELS = 2**18  # activations of more would outweigh the weights of a large ViT
_LARGEST_FRUGAL = 64


@dataclass(frozen=True)
class Batch:
    """Some files; `pixels` has a row for each readable one, in order."""

    files: tuple[str, ...]
    pixels: NDArray[np.uint8] | None  # (readable, height, width, 3); None if none is readable
    errors: dict[str, str]  # by file


def frugal_batch(config: PreprocessConfig) -> int:
    """Return how many images to run at once where memory counts more than time."""
    height, width = config.size
    return max(1, min(_LARGEST_FRUGAL, _FRUGAL_PIXELS // (height * width)))


def preprocess_files(
    files: Sequence[str], config: PreprocessConfig, batch_size: int
) -> Iterator[Batch]:
    """Yield batches in order, with one batch of pixels in memory at a time."""
    for start in range(0, len(files), batch_size):
        names = tuple(files[start : start + batch_size])
        pixels, errors = [], {}
        for name in names:
            try:
                pixels.append(preprocess(name, config))
            except ImageError as error:
                errors[name] = str(error)
        yield Batch(names, np.stack(pixels) if pixels else None, errors)
