"""Decoding of one image from a path, bytes, an array or a Pillow image."""

import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from capt_deploy.core.errors import ImageError
from capt_deploy.core.files import open_file
from capt_deploy.core.install import install_hint

ImageInput = str | Path | bytes | NDArray[np.uint8] | Image.Image
"""A path, an encoded file as bytes, an HWC RGB uint8 array (or HW grey), or a Pillow image."""

Size = tuple[int, int]
"""Width and height in pixels, in Pillow's order."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
R = TypeVar("R")

# The formats that are read, by Pillow's names, whatever a file is called: other decoders are less
# tried, and the one of EPS starts another program. Pillow has the first five at hand.
_FORMATS = {
    "JPEG": {".jfif", ".jpeg", ".jpg"},
    "PNG": {".png"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "PPM": {".pgm", ".ppm"},
    "WEBP": {".webp"},
    "TIFF": {".tif", ".tiff"},
    "AVIF": {".avif"},
}
HEIC_SUFFIXES = frozenset({".heic", ".heif"})
IMAGE_SUFFIXES = HEIC_SUFFIXES.union(*_FORMATS.values())

LARGEST_PIXELS = 2**29 // 3
"""Pixels of the largest image that is decoded: 179 million, at which Pillow stops, too. In colour
they take 0.7 GB. Phones take photos of up to 108 million, in special modes 200."""
MOST_SCANS = 100
"""Scans of a JPEG that is decoded; libtiff has the same limit. Progressive JPEGs have about 10, and
each more is another pass over all pixels that costs an attacker some bytes."""

# Markers of a JPEG with a length behind them. Decoders skip others as noise within a scan.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx"}
_HEIC_BRANDS |= {b"mif1", b"msf1"}  # AVIF has these as well, but never alone
_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)
_BLOCK = 1024  # pixels a side
_LARGEST_TILE = 2**22  # pixels, of a TIFF that is smaller

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


def heic_obstacle() -> str | None:
    """Return why HEIC photos cannot be read here, and the way out; None if they can be read."""
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return (
                f"HEIC is not read without pillow-heif: {install_hint('heic')}, or convert to JPEG"
            )
        register_heif_opener()
    return None


def load_image(source: ImageInput) -> Image.Image:
    """Return a decoded Pillow image, upright (EXIF orientation applied), 8 bits a channel.

    The colour mode is left as it is: `preprocess` converts after resizing, as open_clip does. EXIF
    that cannot be read means no orientation, never no image.

    Files and bytes of more than `LARGEST_PIXELS` or `MOST_SCANS` are refused before they are
    decoded; arrays and Pillow images are taken as large as they are. This bounds memory: 4 bytes a
    pixel, 8 to turn an image, 10 for progressive JPEG, 12 for AVIF and HEIC, 16 for WebP, and some
    times the file for its metadata. Time grows with pixels, scans and file, and has no bound of its
    own: a decoder cannot be stopped.

    Raises:
        ImageError: a URL, an array of another form, an image of an unknown format, truncated or
            too large, or one whose decoder raises anything else.
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
    return with_image_errors(source, lambda: _load(source, enough))


def with_image_errors(source: ImageInput, work: Callable[[], R]) -> R:
    """Call `work` and return its result; turn its errors into an `ImageError` of the image.

    Decoders report damage by errors of any type: OSError, struct.error, IndexError, MemoryError, …
    """
    handled = sys.exc_info()[1]  # by the caller, whose frames are not ours
    try:
        return work()
    except Exception as cause:
        _free_locals(cause, handled)
        if isinstance(cause, ImageError):
            raise
        raise ImageError(f"{_describe(source)}: {_reason(cause)}") from cause


def _free_locals(error: BaseException | None, handled: BaseException | None) -> None:
    """Free the pixels that frames of an error hold: a caller may keep thousands of errors."""
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _reason(cause: Exception) -> str:
    match cause:
        case FileNotFoundError():
            return "no such file"
        case UnidentifiedImageError():
            known = ", ".join([*_FORMATS, "HEIC"])
            return f"no image of a format that is known ({known}), or damaged"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"too many pixels ({cause})"
    return f"damaged or unreadable image ({str(cause) or type(cause).__name__})"


def _load(
    source: ImageInput, enough: Callable[[Size], Size] | None
) -> tuple[Image.Image, Box | None]:
    name = _describe(source)
    if isinstance(source, np.ndarray):
        return _from_array(source), None
    opened = nullcontext(source) if isinstance(source, Image.Image) else open_image(source)
    with opened as image:
        shrunk = None
        if enough is not None and image is not source and image.format in ("JPEG", "MPO"):
            shrunk = _shrink_when_decoded(image, enough)
        image.load()
        turn = _turn(image)
    image = _in_eight_bits(image, name)
    box = None if shrunk is None else _turned(shrunk, image.size, turn)
    # Not ImageOps.exif_transpose: it writes all of EXIF anew and fails on a harmless broken tag.
    return (image if turn is None else image.transpose(turn)), box


@contextmanager
def open_image(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Yield the image in a file or in bytes; its pixels are not decoded yet.

    Raises:
        ImageError: a URL, another type, or more pixels or scans than are decoded.
        Exception: whatever Pillow raises for a header that is damaged or of no known format.
    """
    name = _describe(source)
    with _stream(source, name) as stream:
        image = _identified(stream, name)
        width, height = image.size
        if width * height > LARGEST_PIXELS:
            raise ImageError(
                f"{name}: too many pixels: expected at most {LARGEST_PIXELS}, came {width} x "
                f"{height}; make it smaller"
            )
        # A decoder holds whole tiles of a TIFF, whose size the file says as well.
        tags = getattr(image, "tag_v2", {})
        tile = tags.get(ExifTags.Base.TileWidth, 0) * tags.get(ExifTags.Base.TileLength, 0)
        if tile > max(width * height, _LARGEST_TILE):
            raise ImageError(
                f"{name}: expected tiles of at most {_LARGEST_TILE} pixels, came {tile}"
            )
        yield image


def _stream(source: str | Path | bytes, name: str) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        raise ImageError(f"expected a path, bytes, array or Pillow image, came {type(source)}")
    if str(source).lower().startswith(("http://", "https://")):
        raise ImageError(f"{name}: URLs are not fetched; download it and pass the path")
    return open_file(Path(source))


def _identified(stream: IO[bytes], name: str) -> ImageFile.ImageFile:
    """Return the image of a stream; only the formats of IMAGE_SUFFIXES are tried."""
    formats, brands = list(_FORMATS), _brands(stream)
    if brands & (_AVIF_BRANDS | _HEIC_BRANDS):
        # These are turned by boxes of their own. EXIF never turns them, but damaged it stops them.
        stream = io.BytesIO(_EXIF_ITEM.sub(rb"\1free", stream.read()))
        if not brands & _AVIF_BRANDS:
            if obstacle := heic_obstacle():
                raise ImageError(f"{name}: {obstacle}")
            formats = ["HEIF"]
    image = Image.open(stream, formats=formats)
    if image.format in ("JPEG", "MPO"):
        _check_scans(stream, name)
    elif type(image) is PngImagePlugin.PngImageFile:
        image.__class__ = _Png
    return image


def _brands(stream: IO[bytes]) -> set[bytes]:
    """Return the brands that a file of the ISO base media format names, such as `avif`."""
    head = stream.read(256)
    stream.seek(0)
    if head[4:8] != b"ftyp":
        return set()
    end = min(len(head), int.from_bytes(head[:4], "big"))
    return {head[8:12]} | {head[place : place + 4] for place in range(16, end, 4)}


def _check_scans(stream: IO[bytes], name: str) -> None:
    """Refuse a JPEG of too many scans; of an MPO, the first image counts."""
    stream.seek(0)
    jpeg, place, scans = stream.read(), 2, 0
    while marker := _MARKER.search(jpeg, place):
        place = marker.end()
        if marker[1][0] == _END_OF_IMAGE:
            return
        scans += marker[1][0] == _START_OF_SCAN
        if scans > MOST_SCANS:
            raise ImageError(
                f"{name}: expected a JPEG of at most {MOST_SCANS} scans, came more; save it anew"
            )
        place += int.from_bytes(jpeg[place : place + 2], "big")


class _Png(PngImagePlugin.PngImageFile):
    """A PNG whose pixels are not lost for damaged text or profiles behind them."""

    def load_end(self) -> None:
        """Read what follows the pixels, as far as that goes."""
        with suppress(Exception):
            super().load_end()


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
    with suppress(Exception):  # EXIF is damaged far more often than pixels are
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _turned(box: Box, size: Size, turn: Image.Transpose | None) -> Box:
    """Return the place in the upright image of a box at the upper left of the stored one."""
    (_, _, *extent), whole = box, size
    if turn in _SIDEWAYS:
        extent, whole = extent[::-1], size[::-1]
    left = whole[0] - extent[0] if turn in _ENDS_RIGHT else 0
    top = whole[1] - extent[1] if turn in _ENDS_BELOW else 0
    return left, top, left + extent[0], top + extent[1]


def _in_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Return an image that can be resized and converted, 8 bits a channel, or refuse it.

    16-bit grey is scaled: Pillow's own conversion would clip it to white.
    """
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, came {image.size}")
    if image.mode == "F":
        raise ImageError(
            f"{name}: expected 8 or 16 bits a channel, came 32-bit floats; convert it first"
        )
    if image.mode == "La":  # Pillow converts it to nothing else
        return image.convert("LA")
    if not image.mode.startswith("I"):
        return image
    divisor = 257
    if image.mode == "I":
        low, high = cast(tuple[int, int], image.getextrema())
        if low < 0 or high > 65535:
            raise ImageError(
                f"{name}: expected 8 or 16 bits a channel, came 32-bit integers from {low} to "
                f"{high}; convert it first"
            )
        # Netpbm's values are scaled to 16 bits when they are read.
        divisor = 257 if high > 255 or image.format == "PPM" else 1
    elif getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,):  # of a TIFF
        divisor = 16
    grey = Image.new("L", image.size)
    # In blocks: whole arrays would take several times the memory of the image.
    for left, top in product(range(0, image.width, _BLOCK), range(0, image.height, _BLOCK)):
        right, bottom = min(left + _BLOCK, image.width), min(top + _BLOCK, image.height)
        values = np.asarray(image.crop((left, top, right, bottom))) // divisor
        grey.paste(Image.fromarray(values.astype(np.uint8)), (left, top))
    return grey
