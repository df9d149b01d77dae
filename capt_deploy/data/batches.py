"""Image files in batches of pixels; an unreadable file costs only its own row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.core.errors import ImageError
from capt_deploy.core.machine import usable_cores
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

T = TypeVar("T")
R = TypeVar("R")
_FRUGAL_PIXELS = 2**18  # activations of more would outweigh the weights of a large ViT
_LARGEST_FRUGAL = 64


@dataclass(frozen=True)
class Batch:
    """Image files and the pixels of the readable ones, in order."""

    files: tuple[str, ...]
    pixels: NDArray[np.uint8] | None  # (readable, height, width, 3); None if none is readable
    errors: dict[str, str]  # by file


def frugal_batch(config: PreprocessConfig) -> int:
    """Return a batch size for where memory counts more than time."""
    height, width = config.size
    return max(1, min(_LARGEST_FRUGAL, _FRUGAL_PIXELS // (height * width)))


def in_batches(
    items: Iterable[T], work: Callable[[T], R], batch_size: int, threads: int | None = None
) -> Iterator[list[R]]:
    """Yield the results of `work` on items, in order, in lists of `batch_size`.

    A pool of `threads`, by default one for each core, works on the next list while the caller has
    the last one. Only the caller's thread iterates over `items`. An error in `work` is raised with
    the list of its item.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, came {batch_size}")
    rest = iter(items)
    first = list(islice(rest, batch_size))
    if len(first) == 1 < batch_size:  # a thread would take longer than it saves
        yield [work(first[0])]
        return
    pool = ThreadPoolExecutor(threads or usable_cores(), "capt-decode")
    try:
        ahead = [_begin(pool, work, item) for item in first]
        first.clear()
        while ahead:
            current = ahead
            ahead = [_begin(pool, work, item) for item in islice(rest, batch_size)]
            results = [future.result() for future in current]
            current.clear()  # or the pixels would be kept while the caller works
            yield results
            del results
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(pool: ThreadPoolExecutor, work: Callable[[T], R], item: T) -> "Future[R]":
    if isinstance(item, Image.Image):
        # Pillow reads pixels and EXIF late, and two threads may get the same image.
        with suppress(Exception):  # that `work` raises as well
            item.load()
            item.getexif()
    return pool.submit(work, item)


def preprocess_files(
    files: Sequence[str], config: PreprocessConfig, batch_size: int, *, fast_decode: bool = False
) -> Iterator[Batch]:
    """Yield batches in order; while the caller works on one, the next one is decoded."""

    def work(name: str) -> tuple[str, NDArray[np.uint8] | ImageError]:
        try:
            return name, preprocess(name, config, fast_decode=fast_decode)
        except ImageError as error:
            return name, error

    for batch in in_batches(files, work, batch_size):
        errors = {name: str(result) for name, result in batch if isinstance(result, ImageError)}
        pixels = [result for _, result in batch if not isinstance(result, ImageError)]
        names = tuple(name for name, _ in batch)
        yield Batch(names, np.stack(pixels) if pixels else None, errors)
