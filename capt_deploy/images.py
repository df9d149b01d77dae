"""Decode one image from whatever the caller has: a path, bytes, an array, a Pillow image."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from capt_deploy.errors import ImageError

ImageInput = str | Path | bytes | NDArray[np.uint8] | Image.Image
"""A path, an encoded file as bytes, an HWC RGB uint8 array (or HW grey), or a Pillow image."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)

_UPRIGHT = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageInput) -> Image.Image:
    """Return a decoded Pillow image, upright (EXIF orientation applied), 8 bits a channel.

    The colour mode is left as it is: `preprocess` converts after resizing, as open_clip does.

    Raises:
        ImageError: not an image, truncated, absurdly large, a URL, or an array of another form.
    """
    name = _describe(source)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes):
            image = Image.open(io.BytesIO(source))
        elif not isinstance(source, str | Path):
            raise ImageError(f"expected a path, bytes, array or Pillow image, came {type(source)}")
        else:
            if str(source).lower().startswith(("http://", "https://")):
                raise ImageError(f"{name}: URLs are not fetched; download it and pass the path")
            image = Image.open(source)
        image.load()
        if image.mode == "F":
            raise ImageError(
                f"{name}: expected 8 or 16 bits a channel, came 32-bit floats; convert it first"
            )
        return _to_eight_bits(_upright(image))
    except FileNotFoundError as cause:
        raise ImageError(f"{name}: no such file") from cause
    except (UnidentifiedImageError, Image.DecompressionBombError) as cause:
        raise ImageError(f"{name}: not a readable image ({cause})") from cause
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError) as cause:
        # Pillow's decoders report damaged files by any of these.
        raise ImageError(f"{name}: damaged or unreadable image ({cause})") from cause


def _describe(source: ImageInput) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype} {source.shape}>"
    if isinstance(source, Image.Image):
        return f"<{type(source).__name__} {source.mode} {source.size}>"
    return str(source)


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageError(
            f"expected a uint8 array of shape (height, width, 3) in RGB order or (height, width), "
            f"came {array.dtype} {array.shape}; scale to 0-255 and convert with .astype('uint8')"
        )
    if array.size == 0:
        raise ImageError(f"expected at least one pixel, came an array of shape {array.shape}")
    return Image.fromarray(array)


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes all of EXIF anew and fails on a harmless broken tag.
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits: Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        deep = image.mode != "I" or values.max(initial=0) > 255
        scaled = values // 257 if deep else values
        return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    return image
