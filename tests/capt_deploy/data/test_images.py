"""Decoding: everything that people pass, and what they are told when it is no image."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capt_deploy.core.errors import ImageError
from capt_deploy.data.images import IMAGE_SUFFIXES, load_image

Image.init()
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
# What a viewer has to do with the stored pixels, from the EXIF 2.32 table of orientations.
STORED_TO_UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(PIXELS), exif=exif)


@pytest.mark.parametrize("orientation", STORED_TO_UPRIGHT)
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(load_image(oriented(orientation)))
    np.testing.assert_array_equal(upright, STORED_TO_UPRIGHT[orientation](PIXELS))


@pytest.mark.parametrize("orientation", [0, 9, 600])
def test_an_unknown_orientation_leaves_the_image_as_it_is(orientation: int) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(oriented(orientation))), PIXELS)


def test_a_broken_exif_tag_does_not_cost_the_photo() -> None:
    # XResolution (282) as text: Pillow's own exif_transpose cannot write that back
    exif = b"II*\x00\x08\x00\x00\x00\x02\x00"
    exif += struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 282, 2, 3, b"ab\0\0")
    exif += b"\x00\x00\x00\x00"
    image = load_image(encode(Image.fromarray(PIXELS), exif=b"Exif\x00\x00" + exif))
    np.testing.assert_array_equal(np.asarray(image), STORED_TO_UPRIGHT[6](PIXELS))


@pytest.mark.parametrize("kind", [str, Path, "bytes", "array", "pillow"])
def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path, kind: object) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(Image.fromarray(PIXELS)))
    sources = {
        str: str(path),
        Path: path,
        "bytes": path.read_bytes(),
        "array": PIXELS,
        "pillow": Image.fromarray(PIXELS),
    }
    np.testing.assert_array_equal(np.asarray(load_image(sources[kind])), PIXELS)


def test_a_grey_array_and_a_strided_one_are_taken() -> None:
    np.testing.assert_array_equal(np.asarray(load_image(PIXELS[..., 0])), PIXELS[..., 0])
    np.testing.assert_array_equal(np.asarray(load_image(PIXELS[::2, ::-1])), PIXELS[::2, ::-1])


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (PIXELS.astype(np.float32), ["float32", "(5, 8, 3)", "uint8"]),
        (PIXELS.astype(np.int64), ["int64"]),
        (PIXELS > 9, ["bool"]),
        (np.zeros((3, 5, 8), np.uint8), ["(3, 5, 8)"]),
        (np.zeros((5, 8, 4), np.uint8), ["(5, 8, 4)"]),
        (np.zeros((2, 5, 8, 3), np.uint8), ["(2, 5, 8, 3)"]),
        (np.zeros(7, np.uint8), ["(7,)"]),
        (np.zeros((0, 8, 3), np.uint8), ["(0, 8, 3)", "at least one pixel"]),
    ],
)
def test_an_array_of_another_form_is_refused(array: np.ndarray, named: list[str]) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(array)
    assert all(text in str(caught.value) for text in named)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = np.array([[0, 256, 257, 32896, 65534, 65535]], dtype=np.uint16)
    image = load_image(encode(Image.fromarray(deep)))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), [[0, 0, 1, 128, 254, 255]])


@pytest.mark.parametrize(("top", "expected"), [(200, [[0, 100, 200]]), (65535, [[0, 0, 255]])])
def test_thirty_two_bit_grey_is_scaled_only_if_it_has_more_than_eight_bits(
    top: int, expected: list[list[int]]
) -> None:
    values = np.array([[-5, 100, top]], dtype=np.int32)
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(values))), expected)


def bomb() -> bytes:
    """A PNG of 58 bytes that claims 30000 x 30000 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + checked + end


JPEG = encode(Image.fromarray(PIXELS.repeat(20, 0).repeat(20, 1)), "JPEG")
BROKEN = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": encode(Image.fromarray(PIXELS))[:-40],
    "text.jpg": b"this is no image at all\n",
    "empty.jpg": b"",
    "bomb.png": bomb(),
    "page.jpg": b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_told_what_is_wrong(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(
        ImageError, match=r"damaged or unreadable|no image of a format|not a readable image"
    ) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_broken_bytes_are_named_by_their_length() -> None:
    with pytest.raises(ImageError, match="<24 bytes>"):
        load_image(BROKEN["text.jpg"])


def test_a_bomb_is_refused_for_its_size() -> None:
    with pytest.raises(ImageError, match="900000000 pixels"):
        load_image(bomb())


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.jpg: no such file"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=str(tmp_path)):
        load_image(tmp_path)
    with pytest.raises(ImageError):
        load_image("a\0b.jpg")


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "HTTP://example.org/a.jpg"])
def test_a_url_is_refused_and_the_way_out_is_told(url: str) -> None:
    with pytest.raises(ImageError, match="URLs are not fetched; download it") as caught:
        load_image(url)
    assert url in str(caught.value)


def test_floats_are_refused_for_their_range_is_unknown() -> None:
    with pytest.raises(ImageError, match="32-bit floats"):
        load_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))


@pytest.mark.parametrize("source", [["a.jpg"], bytearray(b"x"), None, 3])
def test_another_type_is_refused(source: object) -> None:
    with pytest.raises(ImageError, match="expected a path, bytes, array or Pillow image"):
        load_image(source)  # type: ignore[arg-type]


def valid_files() -> list[bytes]:
    image = Image.fromarray(PIXELS)
    forms = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"]
    forms += [form for form in ("WEBP", "AVIF") if form in Image.SAVE]
    return [oriented(6), *(encode(image, form) for form in forms)]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=300)
@given(
    data=st.sampled_from(valid_files()),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
)
def test_damaged_bytes_give_an_image_or_an_image_error_and_nothing_else(
    data: bytes, changes: list[tuple[int, int]], keep: float
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        image = load_image(bytes(damaged[: round(keep * len(damaged))]))
    except ImageError as error:
        assert "bytes>" in str(error)
    else:
        assert image.width * image.height > 0


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_an_image_error() -> None:
    data = bytearray(encode(Image.fromarray(PIXELS), "AVIF"))
    place = data.index(b"iloc")
    data[place : place + 4] = b"free"
    with pytest.raises(ImageError):
        load_image(bytes(data))


def test_suffixes_are_lower_case_and_hold_the_common_ones() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_pillow_image_without_pixels_is_refused(size):
    with pytest.raises(ImageError, match="at least one pixel"):
        load_image(Image.new("RGB", size))


def test_premultiplied_grey_is_read():
    grey = Image.new("LA", (4, 4), (100, 255))
    assert load_image(grey.convert("La")).convert("RGB").getpixel((0, 0)) == (100, 100, 100)
