"""The trained model's answers that a bundle carries in `reference.safetensors`.

Photos are not part of a bundle: they are named by the SHA-256 of their files. Besides them there
are a few patterns, which every machine draws alike.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.read import REFERENCE, Bundle
from capt_deploy.core.console import track
from capt_deploy.core.errors import BundleError, DataError
from capt_deploy.core.files import parse_json, safetensors_metadata, sha256_file
from capt_deploy.data.folders import find_files

PATTERNS = 8


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the trained model for labelled images and for the patterns."""

    sha256: tuple[str, ...]  # of the image files
    labels: NDArray[np.int64]  # (images,); -1 where the class is not known
    images: Outputs
    patterns: Outputs

    def save(self) -> bytes:
        """Return the content of `reference.safetensors`."""
        from safetensors.numpy import save

        tensors = {
            f"{kind}.{name}": np.ascontiguousarray(array)
            for kind, outputs in (("images", self.images), ("patterns", self.patterns))
            for name, array in outputs._asdict().items()
        }
        return save({**tensors, "labels": self.labels}, {"sha256": json.dumps(self.sha256)})

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "ReferenceOutputs":
        """Read the reference of a bundle.

        Raises:
            BundleError: the bundle has none, or it is damaged.
        """
        if REFERENCE not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path}: holds no {REFERENCE}, so there is nothing to check against; "
                f"export it again"
            )
        tensors, data = bundle.arrays(REFERENCE), bundle.read(REFERENCE)
        try:
            texts = safetensors_metadata(data, REFERENCE, BundleError)
            listed = parse_json(texts["sha256"], REFERENCE, BundleError)
            sha256 = tuple(map(str, listed))
            images, patterns = (
                Outputs(*(tensors[f"{kind}.{name}"] for name in Outputs._fields))
                for kind in ("images", "patterns")
            )
            reference = cls(sha256, tensors["labels"], images, patterns)
        except (KeyError, ValueError, TypeError, BundleError) as cause:
            raise BundleError(f"{bundle.path}: {REFERENCE} is damaged ({cause})") from cause
        classes, count = len(bundle.manifest.class_names), len(sha256)
        labels, dim = reference.labels, bundle.text_embeddings()["text_embeddings"].shape[1:]
        for outputs, rows in ((images, count), (patterns, PATTERNS)):
            shapes = {outputs.logits.shape, outputs.probabilities.shape}
            fits = shapes == {(rows, classes)} and outputs.embedding.shape == (rows, *dim)
            fits &= all(a.dtype == np.float32 and np.isfinite(a).all() for a in outputs)
            fits &= labels.shape == (count,) and labels.dtype.kind == "i"
            if not fits or not ((labels >= -1) & (labels < classes)).all():
                raise BundleError(
                    f"{bundle.path}: {REFERENCE} does not answer for {count} images, {PATTERNS} "
                    f"patterns and {classes} classes; export it again"
                )
        return reference

    def find(self, folder: Path) -> dict[int, Path]:
        """Return the images that lie somewhere below `folder`, by their row.

        Raises:
            DataError: none of them does.
        """
        rows = {digest: row for row, digest in enumerate(self.sha256)}
        files = {}
        for file in track(find_files(folder).paths, "looking for the images", "files"):
            if (row := rows.get(sha256_file(file))) is not None:
                files[row] = file
        if not files:
            raise DataError(
                f"{folder}: holds none of the {len(rows)} images that the export was checked on; "
                f"pass the data set of the run, or leave --gate-data out"
            )
        return dict(sorted(files.items()))


def draw_patterns(size: tuple[int, int], count: int = PATTERNS) -> NDArray[np.uint8]:
    """Draw waves of colour, in whole numbers so that all machines draw the same.

    Returns:
        uint8 array (count, height, width, 3), RGB.
    """
    height, width = size
    y, x, channel, number = np.ogrid[:height, :width, :3, :count]
    along = (number + 1) * 128 * x // width + (channel * number + 2) * 96 * y // height
    wave = np.abs((along + 61 * channel * (number + 1)) % 510 - 255)
    return np.ascontiguousarray(np.moveaxis(wave, -1, 0)).astype(np.uint8)
