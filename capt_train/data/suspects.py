"""Photos to look at again: labels that are probably wrong, and copies of one photo.

Every photo is judged by a model that was tuned without it. The less probable its label then is, the
more suspect it is, as in confident learning (arXiv 1911.00068). Read without torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.core.errors import ImageError, RunError
from capt_deploy.core.files import is_inside, read_json, write_json
from capt_deploy.data.images import load_shrunk
from capt_deploy.metrics.probabilities import Floats, Ints

SUSPECTS = "suspects.json"
_SCHEMA = 1
# Embeddings of a photo and of its copy, shrunk or recompressed, are at least so alike; and so are
# their thumbnails, whatever the brightness. Bursts of one thing are alike up to 0.985.
_NEAR, _SAME = 0.8, 0.99
_SIDE = 16  # pixels of a thumbnail
_MOST_COMPARED = 5  # nearest photos of each
_BLOCK = 1024  # photos compared at once


@dataclass(frozen=True)
class SuspectLabel:
    """A photo and what a model that has not seen it thinks of its label."""

    path: str
    split: str  # `train` or `val`
    label: str
    p_label: float  # calibrated probability of the label
    likely: str  # the most probable class
    p_likely: float
    p_wrong: float  # probability that the label is wrong, from the share of wrong labels in all


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


@dataclass(frozen=True)
class Suspects:
    """The content of `suspects.json`."""

    labels: tuple[SuspectLabel, ...]  # the most suspect first
    wrong_share: float  # estimated share of wrong labels
    copies: tuple[Copy, ...]  # those with two labels first, then those in two splits

    @property
    def probably_wrong(self) -> int:
        """Return the number of labels that are more probably wrong than right."""
        return sum(photo.p_wrong > 0.5 for photo in self.labels)

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        write_json(path, {"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Suspects":
        """Read a saved file.

        Raises:
            RunError: it is missing, damaged or of another form.
        """
        content = read_json(path, RunError)
        try:
            if content["schema"] != _SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, expected {_SCHEMA}")
            labels = tuple(SuspectLabel(**row) for row in content["labels"])
            copies = tuple(_copy(row) for row in content["copies"])
            paths = [photo.path for photo in labels]
            paths += [path for copy in copies for path in (copy.first, copy.second)]
            if not all(map(is_inside, paths)):
                raise ValueError("a path leaves the folder of the photos")
            return cls(labels, float(content["wrong_share"]), copies)
        except (KeyError, TypeError, ValueError) as cause:
            raise RunError(f"{path}: not as capt-train writes it ({cause!r})") from cause


def _copy(row: Mapping[str, Any]) -> Copy:
    first_split, second_split = row["splits"]
    first_label, second_label = row["labels"]
    pairs = {"splits": (first_split, second_split), "labels": (first_label, second_label)}
    return Copy(**{**row, **pairs})


def rank_labels(
    paths: Sequence[str],
    splits: Sequence[str],
    labels: Ints,
    probabilities: Floats,
    p_wrong: Floats,
    class_names: Sequence[str],
) -> tuple[SuspectLabel, ...]:
    """Return the photos, those with the least probable labels first.

    Args:
        paths: of the photos.
        splits: of the photos.
        labels: (photos,) columns.
        probabilities: (photos, classes), calibrated, by models that have not seen the photo.
        p_wrong: (photos,) probability that a label is wrong.
        class_names: of the columns.
    """
    p_labels = probabilities[np.arange(len(labels)), labels]
    best = probabilities.argmax(axis=1)
    return tuple(
        SuspectLabel(
            paths[row],
            splits[row],
            class_names[labels[row]],
            float(p_labels[row]),
            class_names[best[row]],
            float(probabilities[row, best[row]]),
            float(p_wrong[row]),
        )
        for row in np.argsort(p_labels, kind="stable").tolist()
    )


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
    for start in range(0, among, _BLOCK):
        rows = embeddings[start : min(start + _BLOCK, among)]
        similar = rows @ embeddings.T
        similar[np.arange(len(rows)), start + np.arange(len(rows))] = -1
        most = min(_MOST_COMPARED, similar.shape[1] - 1)
        nearest = np.argpartition(-similar, most, axis=1)[:, :most] if most else np.empty((0, 0))
        for place, columns in enumerate(nearest.tolist()):
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
