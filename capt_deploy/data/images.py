"""Decoding of one image from a path, bytes, an array or a Pillow image."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from capt_deploy.core.errors import ImageError

ImageInput = str | Path | bytes | NDArray[np.uint8] | Image.Image
"""A path, an encoded file as bytes, an HWC RGB uint8 array (or HW grey), or a Pillow image."""

Size = tuple[int, int]
"""Width and height in pixels, in Pillow's order."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)

_UPRIGHT = {  # the transposition that undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Transpositions that swap rows and columns; that move the left border to the right; and the upper
# border to the bottom.
_SIDEWAYS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
_ENDS_RIGHT = tuple(_UPRIGHT[orientation] for orientation in (2, 3, 6, 7))
_ENDS_BELOW = tuple(_UPRIGHT[orientation] for orientation in (3, 4, 7, 8))


def load_image(source: ImageInput) -> Image.Image:
    """Return a decoded Pillow image, upright (EXIF orientation applied), 8 bits a channel.

    The colour mode is left as it is: `preprocess` converts after resizing, as open_clip does.

    Raises:
        ImageError: not an image, truncated, absurdly large, a URL, or an array of another form.
    """
    return load_shrunk(source, None)[0]


def load_shrunk(
    source: ImageInput, enough: Callable[[Size], Size] | None
) -> tuple[Image.Image, Box | None]:
    """Decode as `load_image`, but let the decoder shrink JPEGs in files and bytes.

    Args:
        source: a path, bytes, array or Pillow image.
        enough: returns, for the size of an upright photo, the size that is still enough; the photo
            is decoded at 1/2, 1/4 or 1/8, the smallest that is no smaller. None decodes it whole.

    Returns:
        The image, and the photo's box in it, as a shrunk photo may end within a pixel. None means
        the whole image.

    Raises:
        ImageError: as by `load_image`.
    """
    name = _describe(source)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source), None
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
        shrunk = None
        if enough is not None and image is not source and image.format in ("JPEG", "MPO"):
            shrunk = _shrink_when_decoded(image, enough)
        image.load()
        image = _usable(image, name)
        turn = _turn(image)
        box = None if shrunk is None else _turned(shrunk, image.size, turn)
        # Not ImageOps.exif_transpose: it writes all of EXIF anew and fails on a harmless broken
        # tag.
        return _to_eight_bits(image if turn is None else image.transpose(turn)), box
    except FileNotFoundError as cause:
        raise ImageError(f"{name}: no such file") from cause
    except UnidentifiedImageError as cause:
        raise ImageError(f"{name}: no image of a format that is known") from cause
    except Image.DecompressionBombError as cause:
        raise ImageError(f"{name}: not a readable image ({cause})") from cause
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError) as cause:
        # Pillow's decoders report damaged files by any of these.
        raise ImageError(f"{name}: damaged or unreadable image ({cause})") from cause


def _usable(image: Image.Image, name: str) -> Image.Image:
    """Return an image that can be resized and converted, or refuse it."""
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, came {image.size}")
    if image.mode == "F":
        raise ImageError(
            f"{name}: expected 8 or 16 bits a channel, came 32-bit floats; convert it first"
        )
    # Pillow converts "La" to nothing but "LA".
    return image.convert("LA") if image.mode == "La" else image


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


def _shrink_when_decoded(image: Image.Image, enough: Callable[[Size], Size]) -> Box | None:
    """Ask the decoder to shrink; return the photo's box in the image as it is stored."""
    if _turn(image) in _SIDEWAYS:
        width, height = enough((image.height, image.width))
        drafted = image.draft(None, (height, width))
    else:
        drafted = image.draft(None, enough(image.size))
    return None if drafted is None else drafted[1]


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def _turned(box: Box, size: Size, turn: Image.Transpose | None) -> Box:
    """Return the place in the upright image of a box at the upper left of the stored one."""
    (_, _, *extent), whole = box, size
    if turn in _SIDEWAYS:
        extent, whole = extent[::-1], size[::-1]
    left = whole[0] - extent[0] if turn in _ENDS_RIGHT else 0
    top = whole[1] - extent[1] if turn in _ENDS_BELOW else 0
    return left, top, left + extent[0], top + extent[1]


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits: Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        deep = image.mode != "I" or values.max(initial=0) > 255
        scaled = values // 257 if deep else values
        return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    return image
