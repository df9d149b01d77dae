"""Pixels for the graph: resize, crop, RGB, in the very order in which open_clip does it.

Pixel normalisation is not here: it is folded into the graph's first convolution.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from capt_deploy.errors import CaptError, ConfigError
from capt_deploy.images import ImageInput, load_image

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")
# A 1 x 20000 image would be blown up to gigabytes before its centre is cropped.
_LARGEST_RESIZED_PIXELS = 64_000_000


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes model input, under open_clip's own keys."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    mode: str = "RGB"
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0  # of the border that "longest" adds

    def __post_init__(self) -> None:
        problems = [
            (self.mode != "RGB", f"mode RGB, came {self.mode!r}"),
            (
                self.interpolation not in _RESAMPLING,
                f"interpolation to be one of {', '.join(_RESAMPLING)}, came {self.interpolation!r}",
            ),
            (
                self.resize_mode not in _RESIZE_MODES,
                f"resize_mode to be one of {', '.join(_RESIZE_MODES)}, came {self.resize_mode!r}",
            ),
            (len(self.size) != 2 or min(self.size) < 1, f"size (height, width), came {self.size}"),
            (len(self.mean) != 3 or len(self.std) != 3, "three values in mean and in std"),
            (not all(value > 0 for value in self.std), f"std above 0, came {self.std}"),
        ]
        for wrong, expected in problems:
            if wrong:
                raise ConfigError(f"preprocessing: expected {expected}")

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], error: type[CaptError] = ConfigError
    ) -> "PreprocessConfig":
        """Read open_clip's preprocessing dictionary; a scalar size means a square.

        Raises:
            error: a key is unknown or missing, or a value cannot be used.
        """
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise error(f"preprocessing: unknown keys {sorted(unknown)}, known are {sorted(known)}")
        if missing := {"size", "mean", "std"} - set(values):
            raise error(f"preprocessing: missing keys {sorted(missing)}")
        try:
            size = values["size"]
            return cls(
                **{
                    **values,
                    "size": (size, size) if isinstance(size, int) else tuple(map(index, size)),
                    "mean": tuple(map(float, values["mean"])),
                    "std": tuple(map(float, values["std"])),
                }
            )
        except ConfigError as cause:
            raise error(str(cause)) from cause
        except (TypeError, ValueError) as cause:
            raise error(f"preprocessing: {cause} in {dict(values)}") from cause

    def to_dict(self) -> dict[str, Any]:
        """Return open_clip's dictionary form, JSON-ready."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def preprocess(
    source: ImageInput, config: PreprocessConfig, *, fast_decode: bool = False
) -> NDArray[np.uint8]:
    """Decode, resize, crop and convert one image.

    Returns:
        uint8 array (height, width, 3), RGB, 0-255.

    Raises:
        ImageError: the image cannot be decoded.
    """
    image = load_image(source)
    resampling = _RESAMPLING[config.interpolation]
    height, width = config.size
    if config.resize_mode == "squash":
        image = image.resize((width, height), resampling)
    elif config.resize_mode == "longest":
        image = image.resize(_keep_ratio(image, config.size, longest=True), resampling)
        image = _centre_crop(image, config.size, config.fill_color)
    else:
        image = _resize_shortest(image, config.size, resampling)
        image = _centre_crop(image, config.size, fill=0)
    return np.asarray(image.convert("RGB"))


def _resize_shortest(
    image: Image.Image, size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    if size[0] == size[1]:
        # torchvision truncates the long side, it does not round it
        short, long = sorted(image.size)
        scaled = int(size[0] * long / short)
        target = (size[0], scaled) if image.width <= image.height else (scaled, size[0])
    else:
        # open_clip ignores the configured interpolation for non-square inputs
        target, resampling = _keep_ratio(image, size, longest=False), Image.Resampling.BICUBIC
    if target[0] * target[1] > _LARGEST_RESIZED_PIXELS:
        return ImageOps.fit(image, (size[1], size[0]), resampling)
    return image.resize(target, resampling)


def _keep_ratio(image: Image.Image, size: tuple[int, int], *, longest: bool) -> tuple[int, int]:
    ratios = image.height / size[0], image.width / size[1]
    ratio = max(ratios) if longest else min(ratios)
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _centre_crop(image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    height, width = size
    missing = max(0, width - image.width), max(0, height - image.height)
    if any(missing):
        left, top = missing[0] // 2, missing[1] // 2
        border = (left, top, missing[0] - left, missing[1] - top)
        colour = (fill,) * len(image.getbands()) if len(image.getbands()) > 1 else fill
        image = ImageOps.expand(image, border, colour)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
