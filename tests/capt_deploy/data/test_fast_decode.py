"""Decoding JPEGs at a lower resolution: only where enough is left, and with nearly its pixels."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capt_deploy import Classifier, ImageError
from capt_deploy.data.images import load_image, load_shrunk
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

GOLDEN = Path(__file__).parents[2] / "golden"


def config(size: tuple[int, int] = (32, 32), **options: object) -> PreprocessConfig:
    return PreprocessConfig(size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), **options)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture without any symmetry, as photos are."""
    corners = np.random.default_rng(4).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=95, **options)
    return buffer.getvalue()


def decoded_size(data: bytes, least: tuple[int, int]) -> tuple[int, int]:
    return load_shrunk(data, lambda _: least)[0].size


def mean_difference(data: bytes, wanted: PreprocessConfig) -> float:
    fast, full = (preprocess(data, wanted, fast_decode=on).astype(int) for on in (True, False))
    return float(np.abs(fast - full).mean())


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ((800, 600), (800, 600)),
        ((401, 300), (800, 600)),
        ((400, 300), (400, 300)),
        ((399, 150), (400, 300)),
        ((200, 150), (200, 150)),
        ((1, 1), (100, 75)),
        ((9000, 1), (800, 600)),
    ],
)
def test_a_jpeg_is_never_smaller_than_what_is_enough(
    least: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert decoded_size(encode(photo(800, 600)), least) == expected


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((16, 16)),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    orientation=st.integers(1, 8),
)
def test_twice_what_is_needed_is_left_of_any_photo(
    size: tuple[int, int], target: tuple[int, int], resize_mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(*size), exif=exif)
    needed: list[tuple[int, int]] = []
    upright = load_image(data).size

    def enough(found: tuple[int, int]) -> tuple[int, int]:
        assert found == upright
        needed.append((2 * target[0], 2 * target[1]))
        return needed[-1]

    left = load_shrunk(data, enough)[0].size
    assert all(
        own >= least or own == full
        for own, least, full in zip(left, needed[0], upright, strict=True)
    )
    wanted = config(target, resize_mode=resize_mode)
    assert preprocess(data, wanted, fast_decode=True).shape == (*target, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_differ_little_whichever_way_up_the_photo_is(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(801, 603, mode), exif=exif)
    for wanted in (config(), config((24, 40)), config(resize_mode="squash")):
        assert 0 < mean_difference(data, wanted) < 1.5


def test_progressive_jpegs_and_those_of_two_pictures_are_shrunk_too() -> None:
    two = encode(photo(640, 480), "MPO", save_all=True, append_images=[photo(640, 480, "L")])
    for data in (encode(photo(640, 480), progressive=True), two):
        assert decoded_size(data, (64, 48)) == (80, 60)
        assert mean_difference(data, config()) < 1.5


def test_everything_else_keeps_every_bit(noise: Callable[..., np.ndarray]) -> None:
    large = photo(640, 480)
    opened = Image.open(io.BytesIO(encode(large)))
    for source in (
        encode(large, "PNG"),
        encode(photo(120, 90)),  # less than four times 32
        np.asarray(large),
        large,
        opened,
    ):
        fast, full = (preprocess(source, config(), fast_decode=on) for on in (True, False))
        np.testing.assert_array_equal(fast, full)
    assert opened.size == (640, 480)


def test_damaged_jpegs_are_image_errors_all_the_same() -> None:
    data = encode(photo(640, 480))
    for broken in (data[: len(data) // 2], data[:30], b""):
        with pytest.raises(ImageError):
            preprocess(broken, config(), fast_decode=True)


def test_a_classifier_decodes_as_it_was_told_to() -> None:
    data = encode(photo(640, 480))
    with (
        Classifier.load(GOLDEN / "tiny.capt") as exact,
        Classifier.load(GOLDEN / "tiny.capt", fast_decode=True) as fast,
    ):
        for own in (exact, fast):
            pixels = preprocess(data, own.manifest.preprocess, fast_decode=own is fast)
            (wanted,) = own.run(pixels[None])
            for found in (own(data), own.predict([data])[0], own.submit(data).result(60)):
                np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-6)
        assert not np.array_equal(exact(data).probabilities, fast(data).probabilities)
