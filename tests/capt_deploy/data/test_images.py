"""Decoding: everything that people pass, and what they are told when it is no image."""

import gc
import io
import os
import re
import struct
import sys
import tracemalloc
import types
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb

import numpy as np
import pytest
from PIL import Image, ImageFile, MpoImagePlugin, PngImagePlugin

from capt_deploy.core.errors import ImageError
from capt_deploy.data import images
from capt_deploy.data.images import (
    IMAGE_SUFFIXES,
    LARGEST_PIXELS,
    MOST_SCANS,
    heic_obstacle,
    load_image,
    load_shrunk,
)

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


def oriented_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif


def oriented(orientation: int) -> bytes:
    return encode(Image.fromarray(PIXELS), exif=oriented_exif(orientation))


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
    values = np.array([[0, 100, top]], dtype=np.int32)
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(values))), expected)


@pytest.mark.parametrize("values", [[-1, 200], [0, 65536], [-1000, 3000], [0, 2**31 - 1]])
def test_thirty_two_bit_integers_beyond_sixteen_bits_are_refused(values: list[int]) -> None:
    """Depth, CT and label maps came out white or black."""
    image = Image.fromarray(np.array([values], dtype=np.int32))
    with pytest.raises(ImageError, match=rf"32-bit integers from {values[0]} to {values[1]}; conv"):
        load_image(encode(image, "TIFF"))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_every_pixel_of_a_deep_image_is_scaled(dtype: str) -> None:
    """1100 x 1050 pixels do not fill their blocks."""
    values = np.random.default_rng(0).integers(0, 65536, (1050, 1100)).astype(dtype)
    image = load_image(Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(image), values // 257)


def test_scaling_takes_hardly_more_memory_than_the_image() -> None:
    deep = Image.new("I;16", (3000, 3000), 40000)
    tracemalloc.start()
    load_image(deep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 3000 * 3000  # bytes, of arrays; three int64 copies took 24 a pixel


def test_twelve_bit_grey_of_a_tiff_is_scaled_from_twelve_bits() -> None:
    packed = bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF])  # 0, 16, 2048, 4095
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1)]
    tiff = b"II*\0" + struct.pack("<IH", 8, 9)
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*entries, (279, 6)])
    image = load_image(tiff + struct.pack("<I", 0) + packed)
    np.testing.assert_array_equal(np.asarray(image), [[0, 1, 128, 255]])


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
        ImageError, match=r"damaged or unreadable|no image of a format|too many pixels"
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


def test_a_damaged_avif_is_an_image_error() -> None:
    data = bytearray(encode(Image.fromarray(PIXELS), "AVIF"))
    place = data.index(b"iloc")
    data[place : place + 4] = b"free"
    with pytest.raises(ImageError):
        load_image(bytes(data))


def test_suffixes_are_lower_case_and_hold_the_common_ones() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= IMAGE_SUFFIXES
    assert {".avif", ".heic", ".heif", ".jfif", ".pgm", ".ppm"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_pillow_image_without_pixels_is_refused(size):
    with pytest.raises(ImageError, match="at least one pixel"):
        load_image(Image.new("RGB", size))


def test_premultiplied_grey_is_read():
    grey = Image.new("LA", (4, 4), (100, 255))
    assert load_image(grey.convert("La")).convert("RGB").getpixel((0, 0)) == (100, 100, 100)


def chunk(kind: bytes, body: bytes, checksum: bytes | None = None) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body)) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + checksum


def png_with(chunks: bytes, place: bytes) -> bytes:
    """A PNG with chunks in front of the one that is named."""
    data = encode(Image.fromarray(PIXELS))
    at = data.index(place) - 4
    return data[:at] + chunks + data[at:]


def avif_with_broken_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    return encode(Image.fromarray(PIXELS), "AVIF", exif=exif, quality=100).replace(
        b"MM\0*", b"XXXX"
    )


BROKEN_EXIF = {
    "short": b"II*\0",
    "like RawTherapee's": bytes.fromhex("0000110000010400") + b"\0" * 40,
    "doubled prefix": b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0",
    "garbage": b"\xa6" * 64,
    "empty": b"",
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", BROKEN_EXIF)
def test_exif_that_cannot_be_parsed_means_no_orientation(form: str, kind: str) -> None:
    if form == "PNG":
        data = png_with(chunk(b"eXIf", BROKEN_EXIF[kind]), b"IDAT")
    else:
        image = Image.fromarray(PIXELS)
        data = encode(image, form, exif=b"Exif\0\0" + BROKEN_EXIF[kind])
    assert load_image(data).size == (8, 5)


def test_a_broken_raw_profile_means_no_orientation() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n      10\nzzzz\n", zip=True)
    assert load_image(encode(Image.fromarray(PIXELS), pnginfo=info)).size == (8, 5)


def test_broken_exif_does_not_cost_an_avif_whose_boxes_turn_it() -> None:
    assert load_image(avif_with_broken_exif()).size == (8, 5)
    turned = encode(Image.fromarray(PIXELS), "AVIF", exif=oriented_exif(6))
    assert load_image(turned).size == (5, 8)
    assert load_image(turned.replace(b"MM\0*", b"XXXX")).size == (5, 8)


BEHIND_PIXELS = {
    "a profile that ends with its name": chunk(b"iCCP", b"icc\0"),
    "a profile of an unknown method": chunk(b"iCCP", b"icc\0\7"),
    "a profile of gigabytes": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**21))),
    "text without its method": chunk(b"zTXt", b"a\0"),
    "text of more than 64 MiB": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20))) * 65,
    "a wrong checksum": chunk(b"tEXt", b"a\0b", b"\0\0\0\0"),
    "a short pHYs": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("kind", BEHIND_PIXELS)
def test_damage_behind_the_pixels_of_a_png_does_not_cost_them(kind: str) -> None:
    image = load_image(png_with(BEHIND_PIXELS[kind], b"IEND"))
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("kind", BEHIND_PIXELS)
def test_damage_in_front_of_the_pixels_is_at_worst_an_image_error(kind: str) -> None:
    try:
        image = load_image(png_with(BEHIND_PIXELS[kind], b"IDAT"))
    except ImageError:
        return
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_pixels_that_are_cut_stay_an_error_whatever_follows_them() -> None:
    data = encode(Image.fromarray(PIXELS))
    pixels = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    end = BEHIND_PIXELS["a profile that ends with its name"] + chunk(b"IEND", b"")
    for broken in (pixels[:50], pixels[:50] + b"\xff" * 20 + pixels[70:]):
        with pytest.raises(ImageError, match="damaged"):
            load_image(data[: data.index(b"IDAT") - 4] + chunk(b"IDAT", broken) + end)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        Exception("x"),
        Image.DecompressionBombWarning("x"),
        IndexError("x"),
        KeyError("x"),
        MemoryError(),
        RecursionError("x"),
        ZeroDivisionError("x"),
        struct.error("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_an_image_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match=rf"bytes>: .*\({error or type(error).__name__}") as caught:
        load_image(JPEG)
    assert caught.value.__cause__ is error


def test_what_ends_the_program_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(KeyboardInterrupt):
        load_image(JPEG)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "source",
    [JPEG[: len(JPEG) // 2], encode(Image.new("F", (8, 8)), "TIFF")],
    ids=["cut", "floats"],
)
def test_an_error_does_not_keep_the_image(source: bytes) -> None:
    """Thousands of them may be kept, as by `Classifier.predict(…, errors="return")`."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    held = [
        value
        for error in chain(caught.value)
        for frame, _ in walk_tb(error.__traceback__)
        for value in frame.f_locals.values()
    ]
    assert not any(isinstance(value, Image.Image) for value in held)


@pytest.mark.parametrize(
    "source", [JPEG, oriented(6), oriented(6)[:-60]], ids=["JPEG", "PNG", "cut"]
)
def test_an_image_is_freed_at_once(source: bytes) -> None:
    """The garbage collector counts objects, not their pixels."""

    def known() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if isinstance(thing, ImageFile.ImageFile)}

    gc.collect()
    gc.disable()
    try:
        before = known()
        with suppress(ImageError):
            load_image(source)
        assert known() <= before
    finally:
        gc.enable()


OTHER_FORMS = sorted(set(Image.SAVE) & set(Image.OPEN) - {"MPO", *images._FORMATS})


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_formats_are_not_opened_whatever_the_file_is_called(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "HEIF":
        pytest.skip("read where pillow-heif is installed")
    mode = {"MSP": "1", "SPIDER": "F", "XBM": "1", "PALM": "1"}.get(form, "RGB")
    try:
        data = encode(Image.new(mode, (32, 32)), form)
    except (OSError, ValueError, KeyError) as cause:
        pytest.skip(f"not written here: {cause}")

    def opened(*_: object) -> None:
        raise SystemExit(f"{form} was opened")

    monkeypatch.setitem(Image.OPEN, form, (opened, None))
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=r"no image of a format that is known \(JPEG, PNG"):
            load_image(source)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Ghostscript is a shell script")
def test_ghostscript_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(ImageError, match="no image of a format that is known"):
        load_image(encode(Image.new("RGB", (40, 40)), "EPS"))
    assert not (tmp_path / "started").exists()


def test_every_suffix_belongs_to_a_format_that_pillow_knows() -> None:
    known = Image.registered_extensions()
    assert all(known[suffix] == form for form, names in images._FORMATS.items() for suffix in names)


def test_an_mpo_is_read_as_a_jpeg() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert isinstance(Image.open(io.BytesIO(data)), MpoImagePlugin.MpoImageFile)
    assert load_image(data).size == (8, 5)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are made otherwise elsewhere")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: .*expected a regular file, came p"):
        load_image(tmp_path / "pipe.png")


def test_a_photo_of_108_million_pixels_is_not_too_large() -> None:
    assert LARGEST_PIXELS > 12000 * 9000


@pytest.mark.parametrize("of_pillow", [None, 10])
def test_more_pixels_are_refused_before_they_are_decoded(
    of_pillow: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST_PIXELS", 39)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", of_pillow)
    cut = encode(Image.fromarray(PIXELS))[:60]  # decoding it would fail
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(cut)
    assert load_image(PIXELS).size == load_image(Image.fromarray(PIXELS)).size == (8, 5)


def test_the_limit_of_pixels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGEST_PIXELS", 39)
    with pytest.raises(ImageError, match=r"at most 39, came 8 x 5; make it smaller"):
        load_image(encode(Image.fromarray(PIXELS)))


def test_a_bomb_warning_made_an_error_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 39)
    data = encode(Image.fromarray(PIXELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"bytes>: too many pixels \(Image size \(40 pixels\)"):
            load_image(data)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def progressive(scans: int) -> bytes:
    """A grey progressive JPEG of 16 x 16 pixels; each scan but the first is one end-of-band run."""
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x10" * 64)
    data += segment(0xC2, struct.pack(">BHHB", 8, 16, 16, 1) + b"\1\x11\0")
    data += segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    data += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x20")  # a run of 4 to 7 blocks
    data += segment(0xDA, b"\1\1\0\0\0\0") + b"\x0f"
    return data + (segment(0xDA, b"\1\1\0\1\x3f\0") + b"\x1f") * (scans - 1) + b"\xff\xd9"


def test_scans_are_not_hidden_behind_what_decoders_skip_as_noise() -> None:
    jpeg = progressive(500)
    start = jpeg.index(b"\xff\xda")
    restarts = segment(0xDD, b"\0\1")
    # a length behind a marker that has none, as long as the rest of the file
    noise = b"\xff\x02" + (len(jpeg) - start).to_bytes(2, "big")
    hidden = jpeg[:start] + restarts + jpeg[start : start + 10] + noise + jpeg[start + 10 :]
    with pytest.raises(ImageError, match="scans"):
        load_image(hidden)


def test_a_small_tiff_of_huge_tiles_is_refused() -> None:
    def tiff(tile: int) -> bytes:
        tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: tile, 323: tile}
        tags |= {324: 200, 325: tile * tile}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
        return head.ljust(200, b"\0") + bytes(16 * 16)

    assert load_image(tiff(16)).size == (16, 16)
    with pytest.raises(ImageError, match="tiles of at most 4194304 pixels, came 256000000"):
        load_image(tiff(16_000))


def test_deep_netpbm_is_dark_where_its_values_are(tmp_path: Path) -> None:
    header = b"P5 2 1 65535\n"
    assert np.asarray(load_image(header + bytes([0, 200, 0, 200]))).max() == 0
    assert np.asarray(load_image(header + bytes([128, 0, 255, 255]))).tolist() == [[127, 255]]


def test_an_error_leaves_those_alone_that_the_caller_handles() -> None:
    try:
        own = [1, 2]
        raise ValueError(own)
    except ValueError as error:
        with pytest.raises(ImageError):
            load_image(b"junk")
        assert error.__traceback__ is not None
        assert "own" in error.__traceback__.tb_frame.f_locals


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_image(progressive(MOST_SCANS)).size == (16, 16)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("is decoded"))
    for scans in (MOST_SCANS + 1, 2500):
        with pytest.raises(ImageError, match="expected a JPEG of at most 100 scans, came more"):
            load_image(progressive(scans))
        with pytest.raises(ImageError, match="scans"):
            load_shrunk(
                progressive(scans).replace(b"\xff\xda", b"\xff\xff\xff\xda"), lambda size: size
            )


def test_what_looks_like_a_scan_is_none() -> None:
    """In a comment, such as a thumbnail, and behind the end, such as a film."""
    many = segment(0xDA, b"\1\1\0\1\x3f\0") * 200
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        data = encode(Image.fromarray(noise), "JPEG", quality=95, **options)
        filled = data[:2] + segment(0xFE, many) + data[2:] + many
        np.testing.assert_array_equal(np.asarray(load_image(filled)), np.asarray(load_image(data)))


def heic_content(major: bytes = b"heic", others: bytes = b"mif1heic") -> bytes:
    return struct.pack(">I", 16 + len(others)) + b"ftyp" + major + b"\0\0\0\0" + others + bytes(500)


@pytest.fixture
def without_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.usefixtures("without_heic")
@pytest.mark.parametrize(
    ("major", "others"),
    [(b"heic", b"mif1heic"), (b"mif1", b"heic"), (b"heix", b""), (b"mif1", b"")],
)
def test_heic_without_its_reader_is_told_the_way_out(
    major: bytes, others: bytes, tmp_path: Path
) -> None:
    """Whatever the file is called: phones and messengers rename it to .jpg."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(heic_content(major, others))
    way_out = r"HEIC is not read without pillow-heif: pip install .*\[heic\].*, or convert to JPEG"
    with pytest.raises(ImageError, match=rf"photo\.jpg: {way_out}"):
        load_image(path)
    assert re.fullmatch(way_out, heic_obstacle())


@pytest.mark.usefixtures("without_heic")
def test_a_film_or_an_avif_is_not_taken_for_heic() -> None:
    for data in (heic_content(b"isom", b"mp42"), heic_content(b"mif1", b"avif"), b"\0\0\0\x10ftyp"):
        with pytest.raises(ImageError, match=r"no image of a format that is known|damaged"):
            load_image(data)


def test_heic_is_read_by_the_plugin_of_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it that takes every file for the same picture."""

    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size = "RGB", (8, 5)
            self.tile = []

        def load(self) -> None:
            self.im = Image.fromarray(PIXELS).im

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Plugin, lambda head: head[4:8] == b"ftyp"))

    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    module = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert heic_obstacle() is None
    np.testing.assert_array_equal(np.asarray(load_image(heic_content())), PIXELS)
    monkeypatch.setattr(images, "LARGEST_PIXELS", 39)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(heic_content())


def test_a_photo_of_an_iphone_is_read() -> None:
    pytest.importorskip("pillow_heif")
    assert heic_obstacle() is None
    image = Image.fromarray(np.repeat(np.repeat(PIXELS[:2, :2], 32, 0), 32, 1))
    data = encode(image, "HEIF", quality=100, exif=oriented_exif(1))
    pixels = np.asarray(load_image(data), np.int16)
    assert np.abs(pixels - np.asarray(image)).max() < 16
    damaged = data.replace(b"MM\0*", b"XXXX")
    assert damaged != data
    np.testing.assert_array_equal(np.asarray(load_image(damaged)), pixels)
    with pytest.raises(ImageError):
        load_image(data[: len(data) // 2])
