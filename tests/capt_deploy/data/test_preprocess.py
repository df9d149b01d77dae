"""Pixels: the very ones that open_clip's own transform gives, before its normalisation."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from capt_deploy.core.errors import BundleError, CaptError, ConfigError, ImageError
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.25)
SIZES = [(1, 1), (1, 9), (9, 1), (32, 32), (31, 33), (7, 5), (64, 40), (200, 133), (33, 500)]
TARGETS = [(32, 32), (1, 1), (24, 40), (41, 23)]
RESIZE_MODES = ["shortest", "longest", "squash"]
MODES = [
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "1",
    "HSV",
    "LAB",
    "RGBX",
    "RGBa",
    "PA",
]


def config(size: tuple[int, int] = (32, 32), **options: object) -> PreprocessConfig:
    return PreprocessConfig(size, MEAN, STD, **options)


@pytest.fixture(scope="module")
def reference() -> Callable[[Image.Image, PreprocessConfig], np.ndarray]:
    pytest.importorskip("torch", reason="open_clip's transform is the oracle")
    transform = pytest.importorskip("open_clip.transform")

    def apply(image: Image.Image, wanted: PreprocessConfig) -> np.ndarray:
        values = transform.PreprocessCfg(**json.loads(json.dumps(wanted.to_dict())))
        normalised = transform.image_transform_v2(values, is_train=False)(image)
        pixels = normalised.numpy().transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
        return (255 * pixels).round().astype(np.uint8)

    return apply


def in_mode(pixels: np.ndarray, mode: str) -> Image.Image:
    image = Image.fromarray(pixels)
    if mode in ("LA", "RGBA", "RGBa"):
        image.putalpha(Image.fromarray(pixels[::-1, ::-1, 1].copy()))
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, pixels.tobytes())
    return image.convert("P" if mode == "PA" else image.mode).convert(mode)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("target", TARGETS)
def test_pixels_equal_open_clips_at_every_size(
    reference: Callable, noise: Callable, target: tuple, resize_mode: str, interpolation: str
) -> None:
    wanted = config(target, resize_mode=resize_mode, interpolation=interpolation, fill_color=77)
    for height, width in SIZES:
        if resize_mode == "longest" and min(height * target[1], width * target[0]) < 40:
            continue  # torchvision refuses to shrink a side to no pixel at all
        image = Image.fromarray(noise(height, width))
        np.testing.assert_array_equal(preprocess(image, wanted), reference(image, wanted))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_open_clips_in_every_colour_mode(
    reference: Callable, noise: Callable, mode: str, resize_mode: str
) -> None:
    for target in ((32, 32), (24, 40)):
        wanted = config(target, resize_mode=resize_mode, fill_color=90)
        for size in ((45, 61), (20, 13)):
            image = in_mode(noise(*size), mode)
            assert image.mode == mode
            np.testing.assert_array_equal(preprocess(image, wanted), reference(image, wanted))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [0, 5, bytes(range(256))])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_a_transparent_palette_equals_open_clips(
    reference: Callable, noise: Callable, resize_mode: str, transparency: object
) -> None:
    image = in_mode(noise(45, 61), "P")
    image.info["transparency"] = transparency
    wanted = config((24, 40), resize_mode=resize_mode, fill_color=3)
    np.testing.assert_array_equal(preprocess(image, wanted), reference(image, wanted))


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.just((32, 32)),
    options=st.fixed_dictionaries(
        {
            "resize_mode": st.sampled_from(["shortest", "squash"]),
            "interpolation": st.sampled_from(["bicubic", "bilinear"]),
        }
    ),
    mode=st.sampled_from(["RGB", "L", "RGBA", "1"]),
)
def test_pixels_equal_open_clips_for_any_size_and_target(
    reference: Callable, noise: Callable, size: tuple, target: tuple, options: dict, mode: str
) -> None:
    image, wanted = in_mode(noise(*size), mode), config(target, **options)
    np.testing.assert_array_equal(preprocess(image, wanted), reference(image, wanted))


def test_a_photo_of_twenty_megapixels_equals_open_clips(
    reference: Callable, noise: Callable
) -> None:
    rough = Image.fromarray(noise(40, 60)).resize((5472, 3648))
    wanted = config((224, 224))
    np.testing.assert_array_equal(preprocess(rough, wanted), reference(rough, wanted))


def test_an_extreme_aspect_ratio_equals_open_clips(reference: Callable, noise: Callable) -> None:
    for height, width in ((1, 3000), (3000, 2)):
        image = Image.fromarray(noise(height, width))
        np.testing.assert_array_equal(preprocess(image, config()), reference(image, config()))


@pytest.mark.parametrize("size", [(32, 32), (47, 301), (333, 97)])
def test_real_photos_equal_open_clips(
    reference: Callable, cifar: Path, size: tuple[int, int]
) -> None:
    for path in sorted(cifar.glob("test/*/*.png"))[::800]:
        photo = Image.open(path).resize(size, Image.Resampling.LANCZOS)
        for wanted in (config((224, 224)), config((96, 64), resize_mode="longest")):
            np.testing.assert_array_equal(preprocess(photo, wanted), reference(photo, wanted))


def test_a_rotated_photo_equals_open_clips_on_the_upright_one(
    reference: Callable, noise: Callable, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 61)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = reference(ImageOps.exif_transpose(stored), config())
    np.testing.assert_array_equal(preprocess(tmp_path / "a.jpg", config()), expected)


def test_sixteen_bit_grey_is_the_eight_bit_photo_and_not_white(noise: Callable) -> None:
    grey = noise(45, 61, channels=1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode.startswith("I")
    pixels = preprocess(deep, config())
    np.testing.assert_array_equal(pixels, preprocess(Image.fromarray(grey), config()))
    assert 100 < pixels.mean() < 156


@pytest.mark.parametrize("size", [(1, 70000), (70000, 1)])
@pytest.mark.parametrize("target", [(32, 32), (32, 33)])
def test_an_absurd_aspect_ratio_shows_its_centre_without_gigabytes(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    pixels = np.full((*size, 3), 10, np.uint8)
    middle = (slice(34900, 35100), 0) if size[1] == 1 else (0, slice(34900, 35100))
    pixels[middle] = 200
    shown = preprocess(pixels, config(target))
    assert shown.shape == (*target, 3)
    assert (shown == 200).all()


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_a_hairline_survives_every_resize_mode(resize_mode: str) -> None:
    for size in ((1, 5000), (5000, 1)):
        hairline = np.full((*size, 3), 200, np.uint8)
        shown = preprocess(hairline, config((16, 16), resize_mode=resize_mode))
        assert (shown.shape, shown.dtype) == ((16, 16, 3), np.uint8)
        assert (shown == 200).any()


def test_longest_pads_with_the_fill_colour_on_both_sides() -> None:
    shown = preprocess(
        np.full((10, 20, 3), 200, np.uint8), config((8, 8), resize_mode="longest", fill_color=9)
    )
    assert (shown[:2] == 9).all()
    assert (shown[2:6] == 200).all()
    assert (shown[6:] == 9).all()


def test_a_broken_image_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        preprocess(b"no image", config())


@pytest.mark.parametrize("step", ["resize", "convert", "crop"])
def test_what_fails_behind_the_decoder_is_an_image_error(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = np.zeros((40, 50), np.uint8)
    monkeypatch.setattr(Image.Image, step, lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ImageError, match=r"<array uint8 \(40, 50\)>: damaged .* \(MemoryError\)"):
        preprocess(grey, config())


def test_config_survives_its_own_json_and_has_open_clips_defaults() -> None:
    wanted = config((24, 40), resize_mode="squash", interpolation="bilinear", fill_color=3)
    assert PreprocessConfig.from_dict(json.loads(json.dumps(wanted.to_dict()))) == wanted
    short = PreprocessConfig.from_dict({"size": 224, "mean": MEAN, "std": STD})
    assert short.size == (224, 224)
    defaults = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    assert short.to_dict() == {**GOOD, **defaults, "fill_color": 0}


GOOD = {"size": [224, 224], "mean": list(MEAN), "std": list(STD)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resize": 3}, "resize"),
        ({"mode": "L"}, "mode: expected RGB"),
        ({"interpolation": "nearest"}, "bicubic, bilinear.*nearest"),
        ({"resize_mode": "fit"}, "shortest, longest, squash.*fit"),
        ({"size": 0}, "size"),
        ({"size": [224]}, "size"),
        ({"size": [3, 224, 224]}, "size"),
        ({"size": "22"}, "str"),
        ({"size": None}, "NoneType"),
        ({"mean": [0.5, 0.5]}, "three values"),
        ({"mean": [0.5, 0.5, 0.5, 0.5]}, "three values"),
        ({"mean": ["a", 0.5, 0.5]}, "could not convert"),
        ({"std": [0.5, 0.0, 0.5]}, "std: expected values above 0"),
        ({"std": [0.5, float("nan"), 0.5]}, "std: expected values above 0"),
        ({"std": [10**400, 1, 1]}, "too large"),
        ({"size": 10**30}, "size: expected height and width, 1 to 8192"),
        ({"size": [16, 8193]}, "size: expected height and width, 1 to 8192"),
        ({"fill_color": 256}, "fill_color: expected 0 to 255"),
        ({"fill_color": -1}, "fill_color: expected 0 to 255"),
    ],
)
@pytest.mark.parametrize("error", [ConfigError, BundleError])
def test_unusable_values_are_refused_by_name(
    change: dict[str, object], named: str, error: type[CaptError]
) -> None:
    with pytest.raises(error, match=f"^preprocessing: .*{named}"):
        PreprocessConfig.from_dict({**GOOD, **change}, error)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_value_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"missing keys \['{key}'\]"):
        PreprocessConfig.from_dict({k: v for k, v in GOOD.items() if k != key})
