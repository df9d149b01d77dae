"""Find files that show the same photo. Needs no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.core.errors import ImageError
from capt_deploy.data.images import load_shrunk

# Embeddings of a photo and of its copy, shrunk or recompressed, are at least so alike; and so are
# their thumbnails, whatever the brightness. Bursts of one thing are alike up to 0.985.
_NEAR, _SAME = 0.8, 0.99
_SIDE = 16  # pixels of a thumbnail
_MOST_COMPARED = 5  # nearest photos of each
_BLOCK = 1 << 24  # similarities computed at once, which bounds the memory


@dataclass(frozen=True)
class Copy:
    """Two files with the same photo."""

    first: str
    second: str
    splits: tuple[str, str]
    labels: tuple[str, str]
    similarity: float  # of their thumbnails, 0.99 to 1

    @property
    def problem(self) -> str:
        """Return what the copy spoils; empty if it only counts twice."""
        if self.labels[0] != self.labels[1]:
            return "two labels"
        return "two splits" if self.splits[0] != self.splits[1] else ""


def find_copies(
    files: Sequence[Path],
    embeddings: NDArray[np.floating],
    describe: Callable[[int], tuple[str, str, str]],
    among: int,
) -> tuple[Copy, ...]:
    """Return the pairs of files that show the same photo, also shrunk, recompressed or brightened.

    A photo that was cropped by a few percent is not found. Of three copies, each pair counts.

    Args:
        files: of the photos.
        embeddings: (photos, dim) by the frozen model, unit norm.
        describe: returns the path to show, the split and the class of a photo.
        among: compare the first so many photos with all; the others not with each other.
    """
    thumbnails: dict[int, NDArray[Any] | None] = {}

    def thumbnail(row: int) -> NDArray[Any] | None:
        if row not in thumbnails:
            thumbnails[row] = _thumbnail(files[row])
        return thumbnails[row]

    copies = []
    for first, second in _neighbours(embeddings, among):
        one, other = thumbnail(first), thumbnail(second)
        if one is None or other is None or (alike := float((one * other).sum())) < _SAME:
            continue
        (path, split, label), (path2, split2, label2) = describe(first), describe(second)
        copies.append(Copy(path, path2, (split, split2), (label, label2), min(alike, 1.0)))
    order = ("two labels", "two splits", "")
    return tuple(sorted(copies, key=lambda copy: (order.index(copy.problem), copy.first)))


def _neighbours(embeddings: NDArray[np.floating], among: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of photos with similar embeddings, each once."""
    found: set[tuple[int, int]] = set()
    block = max(1, _BLOCK // len(embeddings))
    for start in range(0, among, block):
        rows = embeddings[start : min(start + block, among)]
        similar = rows @ embeddings.T
        similar[np.arange(len(rows)), start + np.arange(len(rows))] = -1
        most = min(_MOST_COMPARED, similar.shape[1] - 1)
        order = np.argpartition(similar, -most - 1, axis=1) if most else similar[:, :0]
        for place, columns in enumerate(order[:, -most:].astype(int).tolist()):
            for column in columns:
                pair = min(start + place, column), max(start + place, column)
                if similar[place, column] >= _NEAR and pair not in found:
                    found.add(pair)
                    yield pair


def _thumbnail(file: Path) -> NDArray[np.float64] | None:
    """Return grey pixels with mean 0 and norm 1; None of a file that cannot be read or is plain."""
    try:
        image, box = load_shrunk(file, lambda size: (min(size[0], 64), min(size[1], 64)))
        grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX, box)
    except (ImageError, OSError, ValueError):
        return None
    pixels = np.asarray(grey, np.float64)
    pixels = pixels - pixels.mean()
    norm = float(np.linalg.norm(pixels))
    return pixels / norm if norm > _SIDE else None  # else less than one grey level of contrast
