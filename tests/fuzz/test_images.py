"""Damaged images of every format: an `ImageError`, or the pixels that Pillow alone decodes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from capt_deploy.core.errors import ImageError
from capt_deploy.data import images
from capt_deploy.data.images import load_image
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

CONFIG = PreprocessConfig((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What is refused although Pillow decodes it.
OWN_REFUSALS = ("too many pixels", "scans", "32-bit floats", "32-bit integers", "HEIC")
NUMBERS = [0, 1, 2, 7, 8, 12, 16, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
PNG_HEAD = 8  # bytes of its signature


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@cache
def samples(form: str) -> list[bytes]:
    """Return valid files of a format, of several modes and with all kinds of metadata."""
    noise = np.random.default_rng(0).integers(0, 256, (17, 24, 4), dtype=np.uint8)
    rgb, rgba, grey = (Image.fromarray(noise[..., part]) for part in (slice(3), slice(4), 0))
    deep = Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    described = {"exif": exif, "icc_profile": b"a profile" * 20}
    frames = {"save_all": True, "append_images": [ImageOps.mirror(rgb), rgb]}
    text = PngImagePlugin.PngInfo()
    for compressed in (False, True):
        text.add_text("Comment", "words " * 9, zip=compressed)
        text.add_itxt("Title", "words " * 9, zip=compressed)
    choices: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
        "JPEG": [
            (rgb, described),
            (rgb, {"progressive": True, **described}),
            (grey, {"progressive": True}),
            (rgb.convert("CMYK"), {}),
            (rgb, {"restart_marker_blocks": 1}),
        ],
        "MPO": [(rgb, frames)],
        "PNG": [
            (rgb, {"pnginfo": text, **described}),
            (rgba, {}),
            (deep, {}),
            (rgb.quantize(16), {"transparency": 3}),
            (grey.convert("1"), {}),
            (rgb, frames),
        ],
        "BMP": [(rgb, {}), (grey, {}), (rgba, {}), (rgb.quantize(4), {})],
        "GIF": [(rgb, {}), (rgb, {"interlace": 1}), (rgb, frames)],
        "PPM": [(rgb, {}), (grey, {}), (deep, {}), (grey.convert("1"), {})],
        "WEBP": [(rgb, described), (rgba, {"lossless": True, **described}), (rgb, frames)],
        "TIFF": [
            (rgb, described),
            (deep, {}),
            *((rgb, {"compression": kind}) for kind in ("tiff_lzw", "tiff_deflate", "jpeg")),
            (rgb, {"compression": "packbits", "exif": exif}),
            (grey.convert("1"), {"compression": "group4"}),
            (Image.fromarray(noise[..., 0].astype(np.int32)), {}),
            (rgb, frames),
        ],
        "AVIF": [(rgb, described), (rgba, {}), (rgb, frames)],
        "HEIF": [(rgb, described), (rgba, {})],
    }
    return [encode(image, form, **options) for image, options in choices[form]]


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Yield the chunks, segments, directory entries or boxes of a file; else short blocks."""
    place = 0
    while place < len(data):
        size = 16
        if data.startswith(b"\x89PNG"):
            size = int.from_bytes(data[place : place + 4], "big") + 12 if place else PNG_HEAD
        elif data.startswith(b"\xff\xd8"):
            size = int.from_bytes(data[place + 2 : place + 4], "big") + 2 if place else 2
            if place and data[place : place + 1] != b"\xff":
                size = 32  # of entropy-coded data
        elif data.startswith((b"II*\0", b"MM\0*")):
            size = 12 if place else 10
        elif data.startswith(b"RIFF"):
            chunk = int.from_bytes(data[place + 4 : place + 8], "little")
            size = 8 + chunk + chunk % 2 if place else 12
        elif data[4:8] == b"ftyp":
            size = max(8, int.from_bytes(data[place : place + 4], "big"))
        yield data[place : place + size]
        place += size


def change_byte(pieces: list[bytes], number: int, place: int, value: int) -> None:
    piece = bytearray(pieces[number])
    if piece:
        piece[place % len(piece)] = value % 256
    pieces[number] = bytes(piece)


def change_number(pieces: list[bytes], number: int, place: int, value: int) -> None:
    piece, packed = pieces[number], NUMBERS[value % len(NUMBERS)].to_bytes(4, "big")
    packed = (packed, packed[::-1], packed[2:], packed[:1:-1])[value % 4]
    place %= len(piece) + 1
    pieces[number] = piece[:place] + packed + piece[place + len(packed) :]


def cut(pieces: list[bytes], number: int, place: int, value: int) -> None:
    pieces[number] = pieces[number][: place % (len(pieces[number]) + 1)]


def insert(pieces: list[bytes], number: int, place: int, value: int) -> None:
    pieces[number] += struct.pack("<I", value) * (place % 9)


def drop(pieces: list[bytes], number: int, place: int, value: int) -> None:
    pieces[number] = b""


def repeat(pieces: list[bytes], number: int, place: int, value: int) -> None:
    pieces[number] *= min(value % 150, 20_000 // (len(pieces[number]) + 1))


def move(pieces: list[bytes], number: int, place: int, value: int) -> None:
    pieces.insert(place % len(pieces), pieces.pop(number))


CHANGES: list[Callable[[list[bytes], int, int, int], None]]
CHANGES = [change_byte, change_byte, change_number, change_number, cut, insert, drop, repeat, move]


def with_right_checksums(pieces: list[bytes]) -> list[bytes]:
    """Return the chunks of a PNG with their right lengths and checksums, as programs write them."""
    head, *chunks = pieces
    return [
        head,
        *(
            struct.pack(">I", len(chunk) - 12) + body + struct.pack(">I", zlib.crc32(body))
            for chunk in chunks
            if len(chunk) >= 12 and (body := chunk[4:-4])
        ),
    ]


@st.composite
def damaged_files(draw: st.DrawFn, form: str) -> bytes:
    """Draw a file of a format that is changed in places, moved about, cut and spliced."""
    data = draw(st.sampled_from(samples(form)))
    pieces = list(in_pieces(data))
    numbers = st.integers(0, 2**32 - 1)
    places = st.tuples(st.sampled_from(CHANGES), numbers, numbers, numbers)
    for change, number, place, value in draw(st.lists(places, max_size=6)):
        change(pieces, number % len(pieces), place, value)
    if form == "PNG" and draw(st.booleans()):
        pieces = with_right_checksums(pieces)
    data = b"".join(pieces)
    kept = draw(st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.1]))
    tail = draw(st.sampled_from([b"", b"", b"", samples(form)[0], samples("PNG")[0]]))
    return data[: round(kept * len(data))] + tail[len(tail) // 2 :]


def decoded_by_pillow(data: bytes) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(data), formats=[*images._FORMATS])
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception:
        return None


def in_eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "La":
        return np.asarray(image.convert("LA"))
    deep = image.mode != "I" or values.max() > 255
    return values // 257 if image.mode.startswith("I") and deep else values


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Image size")
@pytest.mark.parametrize("form", [*images._FORMATS, "MPO", "HEIF"])
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_image_is_an_image_error_or_right(form: str, data: st.DataObject) -> None:
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    check(data.draw(damaged_files(form)))


def check(data: bytes) -> None:
    """Check that a file gives an `ImageError`, or twice the pixels that Pillow decodes."""
    expected = decoded_by_pillow(data)
    try:
        image = load_image(data)
    except ImageError as error:
        assert str(error).startswith(f"<{len(data)} bytes>: ")
        assert expected is None or any(reason in str(error) for reason in OWN_REFUSALS), str(error)
        with pytest.raises(ImageError):
            preprocess(data, CONFIG)
        return
    assert image.mode not in ("F", "I", "La") and not image.mode.startswith("I;")
    pixels = preprocess(data, CONFIG)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(preprocess(data, CONFIG), pixels)
    assert preprocess(data, CONFIG, fast_decode=True).shape == (16, 16, 3)
    if expected is not None:
        np.testing.assert_array_equal(np.asarray(image), in_eight_bits(expected))
