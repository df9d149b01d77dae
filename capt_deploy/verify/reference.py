"""The trained model's answers that a bundle carries: `reference.safetensors`.

Photos stay at home: the images are named by the SHA-256 of their files. Besides them there are a
few drawn patterns, which every machine can draw again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.bundle.read import REFERENCE, Bundle
from capt_deploy.core.console import track
from capt_deploy.core.errors import BundleError, DataError
from capt_deploy.core.files import sha256_file, visible_files

PATTERNS = 8


@dataclass(frozen=True)
class Reference:
    """Outputs to images with labels, and to the patterns."""

    sha256: tuple[str, ...]  # of the image files
    labels: NDArray[np.int64]  # (images,); -1 where it is not known
    images: Outputs
    patterns: Outputs

    def save(self) -> bytes:
        """Return the content of the file."""
        from safetensors.numpy import save

        tensors = {
            f"{kind}.{name}": np.ascontiguousarray(own)
            for kind, answers in (("images", self.images), ("patterns", self.patterns))
            for name, own in answers._asdict().items()
        }
        return save({**tensors, "labels": self.labels}, {"sha256": json.dumps(self.sha256)})

    @classmethod
    def of(cls, bundle: Bundle) -> "Reference":
        """Read it from a bundle.

        Raises:
            BundleError: the bundle has none, or it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if REFERENCE not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path}: holds no {REFERENCE}, so there is nothing to check against; "
                f"export it again"
            )
        data = bundle.read(REFERENCE)
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            sha256 = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["sha256"])
            images, patterns = (
                Outputs(*(tensors[f"{kind}.{name}"] for name in Outputs._fields))
                for kind in ("images", "patterns")
            )
            found = cls(tuple(sha256), tensors["labels"], images, patterns)
        except (SafetensorError, KeyError, ValueError, TypeError) as cause:
            raise BundleError(f"{bundle.path}: {REFERENCE} is damaged ({cause})") from cause
        classes, count = len(bundle.manifest.class_names), len(found.sha256)
        shapes = [
            (len(own.logits), own.logits.shape[1:], own.probabilities.shape, len(own.embedding))
            for own in (images, patterns)
        ]
        expected = [(n, (classes,), (n, classes), n) for n in (count, PATTERNS)]
        if shapes != expected or found.labels.shape != (count,):
            raise BundleError(
                f"{bundle.path}: {REFERENCE} does not answer for {count} images, {PATTERNS} "
                f"patterns and {classes} classes; export it again"
            )
        return found

    def find(self, folder: Path) -> dict[int, Path]:
        """Return which of the images lie somewhere below `folder`, by place.

        Raises:
            DataError: not one of them does.
        """
        wanted = {digest: place for place, digest in enumerate(self.sha256)}
        found = {}
        for file in track(visible_files(folder), "looking for the images", "files"):
            if (place := wanted.get(sha256_file(file))) is not None:
                found[place] = file
        if not found:
            raise DataError(
                f"{folder}: none of the {len(wanted)} images that the export was checked on is "
                f"there; pass the data set of the run, or leave --gate-data out"
            )
        return dict(sorted(found.items()))


def patterns(size: tuple[int, int], count: int = PATTERNS) -> NDArray[np.uint8]:
    """Draw the patterns: waves of colour, in whole numbers so that all machines draw the same.

    Returns:
        uint8 array (count, height, width, 3), RGB.
    """
    height, width = size
    y, x, channel, number = np.ogrid[:height, :width, :3, :count]
    along = (number + 1) * 128 * x // width + (channel * number + 2) * 96 * y // height
    wave = np.abs((along + 61 * channel * (number + 1)) % 510 - 255)
    return np.ascontiguousarray(np.moveaxis(wave, -1, 0)).astype(np.uint8)


def chosen(answers: Outputs, places: Sequence[int]) -> Outputs:
    """Return the answers to some of the images."""
    rows = list(places)
    return Outputs(*(own[rows] for own in answers))
