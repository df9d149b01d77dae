"""Photos to measure with: those of a folder, or synthetic ones."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from capt_deploy.core.errors import DataError
from capt_deploy.data.folders import images_below
from capt_deploy.data.images import load_image

_SIZE = (500, 375)  # pixels, width and height; typical of photos in common data sets
_QUALITY = 90  # of the JPEGs
_MAX_PHOTOS = 256  # of a folder; all are held in memory


@dataclass(frozen=True)
class Photos:
    """Encoded images and a description of their source."""

    encoded: Sequence[bytes]
    source: str


def synthetic_photos(count: int, seed: int = 0) -> Photos:
    """Return JPEGs of 500x375, the same for the same seed and version of Pillow.

    They contain what costs a decoder time in real photos: smooth shading, edges, and noise.
    """
    encoded = [_photo(np.random.default_rng((seed, number))) for number in range(count)]
    return Photos(encoded, f"synthetic {_SIZE[0]}x{_SIZE[1]}")


def _photo(draw: np.random.Generator) -> bytes:
    shading = draw.integers(40, 216, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(shading).resize(_SIZE, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        x, y = (int(draw.integers(0, side)) for side in _SIZE)
        width, height = (int(value) for value in draw.integers(10, 140, 2))
        colour = (int(draw.integers(256)), int(draw.integers(256)), int(draw.integers(256)))
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((x, y, x + width, y + height), fill=colour)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    noisy = soft + draw.normal(0, 5, soft.shape)
    encoded = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()


def folder_photos(folder: Path) -> Photos:
    """Return the encoded images below a folder, the first 256 by name.

    Raises:
        DataError: the folder holds no image.
        ImageError: an image cannot be decoded.
    """
    files = images_below(folder)[:_MAX_PHOTOS]
    if not files:
        raise DataError(f"{folder}: holds no image; expected a folder with photos to measure with")
    for file in files:
        load_image(file)  # here, because an error can still name the file
    return Photos([file.read_bytes() for file in files], f"{len(files)} of {folder}")
