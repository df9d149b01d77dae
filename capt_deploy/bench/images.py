"""Photos to measure with: a folder's, or made from a seed where there are none."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import visible_files
from capt_deploy.data.images import IMAGE_SUFFIXES, load_image

SIZE = (500, 375)  # pixels, width and height; what photos of common data sets have
_QUALITY = 90  # of the JPEGs
_MOST = 256  # photos of a folder; all are held in memory


def synthetic_photos(count: int, seed: int = 0) -> list[bytes]:
    """Return JPEGs of 500x375, the same for the same seed and version of Pillow.

    Each has what costs a decoder time in real photos: smooth shading, things with edges, and a
    sensor's noise. They show nothing.
    """
    return [_photo(np.random.default_rng((seed, number))) for number in range(count)]


def _photo(draw: np.random.Generator) -> bytes:
    shading = draw.integers(40, 216, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(shading).resize(SIZE, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        x, y = (int(draw.integers(0, side)) for side in SIZE)
        width, height = (int(value) for value in draw.integers(10, 140, 2))
        colour = (int(draw.integers(256)), int(draw.integers(256)), int(draw.integers(256)))
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((x, y, x + width, y + height), fill=colour)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    noisy = soft + draw.normal(0, 5, soft.shape)
    encoded = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()


def folder_photos(folder: Path) -> list[bytes]:
    """Return the encoded images below a folder, the first 256 by name.

    Raises:
        DataError: there is none.
        ImageError: one cannot be decoded.
    """
    files = [f for f in visible_files(folder) if f.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError(f"{folder}: holds no image; expected a folder with photos to measure with")
    for file in files[:_MOST]:
        load_image(file)  # of bytes nobody could tell later from which file they are
    return [file.read_bytes() for file in files[:_MOST]]
