"""Images as embeddings, which are cached by the content of model and image."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import ImageError
from capt_deploy.data.datasets import Dataset, Item, Skipped
from capt_deploy.data.preprocess import PreprocessConfig, preprocess
from capt_train import parallel
from capt_train.clip.backbone import Backbone
from capt_train.data.embedding_cache import EmbeddingCache

_BATCH = 64


@dataclass(frozen=True)
class Features:
    """Embedded images; those that could not be read are left out and listed."""

    embeddings: Float[Tensor, "batch dim"]  # unit norm, float32
    labels: Int[Tensor, " batch"]  # indices of all class names
    skipped: tuple[Skipped, ...] = ()
    embedded: int = 0  # images that went through the visual tower; the others were cached
    sha256: tuple[str, ...] = ()  # of the image files, one per row

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """Return the images of all parts, in order."""
        return cls(
            torch.cat([part.embeddings for part in parts]),
            torch.cat([part.labels for part in parts]),
            tuple(file for part in parts for file in part.skipped),
            sum(part.embedded for part in parts),
            tuple(digest for part in parts for digest in part.sha256),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Int[Tensor, " rows"]) -> "Features":
        """Return some of the images, in the given order."""
        digests = tuple(self.sha256[row] for row in chosen.tolist()) if self.sha256 else ()
        return Features(self.embeddings[chosen], self.labels[chosen], (), 0, digests)

    def kept(self, items: Sequence[Item]) -> list[Item]:
        """Return the readable ones of the embedded `items`, one per row."""
        skipped = {file.path for file in self.skipped}
        return [item for item in items if item.path not in skipped]

    def labels_among(self, classes: Sequence[int]) -> Int[Tensor, " batch"]:
        """Return the labels as positions in `classes`, which is ascending and holds every label."""
        return torch.searchsorted(torch.tensor(list(classes)), self.labels)


@dataclass(frozen=True)
class Embedded:
    """Training and validation images, embedded by one encoder."""

    train: Features
    val: Features  # may be empty


def embed(
    backbone: Backbone,
    cache: EmbeddingCache | None,
    dataset: Dataset,
    items: Sequence[Item],
    label: str,
    encode: Callable[[Tensor], Tensor] | None = None,
    workers: int | None = None,
) -> Features:
    """Embed images in order; of several processes, each embeds its part for all.

    Args:
        backbone: gives the preprocessing, and embeds where there is no `encode`.
        cache: holds embeddings of the same encoder; None embeds every image.
        dataset: the data set of the images.
        items: the images.
        label: their name in the progress bar.
        encode: returns unit-norm embeddings of pixels, in place of the backbone.
        workers: threads that decode; by default about as many as there are cores, at most 8.
    """
    encode, part = encode or backbone.image_embeddings, parallel.split_items(items, _BATCH)
    embedded = _embed(backbone, cache, dataset, part, label, encode, workers)
    features = Features.joined(parallel.gather_items(embedded))
    if skipped := features.skipped:
        number = f"{len(skipped)} of {len(items)} {label}"
        say(f"note: {number} cannot be read and are left out, e.g. {skipped[0].path}")
    return features


def _embed(
    backbone: Backbone,
    cache: EmbeddingCache | None,
    dataset: Dataset,
    items: Sequence[Item],
    label: str,
    encode: Callable[[Tensor], Tensor],
    workers: int | None,
) -> Features:
    """Embed images as `embed` does, in this process."""
    rows: list[NDArray[np.float32]] = []
    labels: list[int] = []
    digests: list[str] = []
    skipped: list[Skipped] = []
    embedded = 0
    with (
        _decoders(workers) as pool,
        progress(f"embedding {label}", len(items), "images") as counter,
    ):
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            files = list(pool.map(_read, [dataset.path(item) for item in batch]))
            keys = [hashlib.sha256(data).hexdigest() for data in files]
            known = {} if cache is None else cache.get(keys)
            missing = {k: data for k, data in zip(keys, files, strict=True) if k not in known}
            decoded = pool.map(lambda data: _decode(data, backbone.preprocess), missing.values())
            results = dict(zip(missing, decoded, strict=True))
            pixels = {k: v for k, v in results.items() if isinstance(v, np.ndarray)}
            if pixels:
                stacked = torch.from_numpy(np.stack(list(pixels.values())))
                vectors = encode(stacked).cpu().numpy()
                new = dict(zip(pixels, vectors, strict=True))
                if cache is not None:
                    cache.put(new)
                known |= new
                embedded += len(new)
            for item, key in zip(batch, keys, strict=True):
                if key in known:
                    rows.append(known[key])
                    labels.append(item.label)
                    digests.append(key)
                else:
                    skipped.append(Skipped(item.path, str(results[key])))
            counter.advance(len(batch), f"{embedded} new, {len(skipped)} unreadable")
    dim = len(rows[0]) if rows else backbone.text_embeddings(["a"]).shape[1]
    return Features(
        torch.from_numpy(np.stack(rows) if rows else np.zeros((0, dim), np.float32)),
        torch.tensor(labels, dtype=torch.long),
        tuple(skipped),
        embedded,
        tuple(digests),
    )


def read_pixels(
    backbone: Backbone, dataset: Dataset, items: Sequence[Item], workers: int | None = None
) -> UInt8[Tensor, "batch height width 3"]:
    """Return the preprocessed pixels of images, RGB 0-255.

    Raises:
        ImageError: one of them cannot be read.
    """
    if not items:
        return torch.zeros((0, *backbone.preprocess.size, 3), dtype=torch.uint8)
    with _decoders(workers) as pool:
        pixels = pool.map(lambda item: preprocess(dataset.path(item), backbone.preprocess), items)
        return torch.from_numpy(np.stack(list(pixels)))


def _decoders(workers: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers or min(8, (os.cpu_count() or 1) + 1))


def every_second(labels: Int[Tensor, " samples"]) -> Bool[Tensor, " samples"]:
    """Return a mask of the second, fourth, … image of each class."""
    same = labels[:, None] == labels[None, :]
    return same.tril(diagonal=-1).sum(dim=1) % 2 == 1


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # decoding it fails, with a reason


def _decode(data: bytes, config: PreprocessConfig) -> NDArray[np.uint8] | str:
    try:
        return preprocess(data, config)
    except ImageError as error:
        return str(error)
