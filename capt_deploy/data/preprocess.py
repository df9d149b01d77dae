"""Pixels for the graph: resize, crop and conversion to RGB in the same order as open_clip.

Pixel normalisation is not here: it is folded into the graph's first convolution.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from capt_deploy.core.errors import CaptError, ConfigError
from capt_deploy.data.images import Box, ImageInput, Size, load_shrunk, with_image_errors

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")
# A 1 x 20000 image would be blown up to gigabytes before its centre is cropped.
_LARGEST_RESIZED_PIXELS = 64_000_000
_LARGEST_SIDE = 8192  # of the graph's input
_MARGIN = 2


@dataclass(frozen=True)
class PreprocessConfig:
    """The preprocessing of a model, with open_clip's keys."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    mode: str = "RGB"
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0  # of the border that "longest" adds

    def __post_init__(self) -> None:
        checks = [
            (self.mode == "RGB", "mode", "RGB"),
            (self.interpolation in _RESAMPLING, "interpolation", ", ".join(_RESAMPLING)),
            (self.resize_mode in _RESIZE_MODES, "resize_mode", ", ".join(_RESIZE_MODES)),
            (self._has_size(), "size", f"height and width, 1 to {_LARGEST_SIDE} pixels"),
            (len(self.mean) == 3, "mean", "three values"),
            (len(self.std) == 3, "std", "three values"),
            (all(value > 0 for value in self.std), "std", "values above 0"),
            (0 <= self.fill_color <= 255, "fill_color", "0 to 255"),
        ]
        for fine, name, expected in checks:
            if not fine:
                value = getattr(self, name)
                raise ConfigError(f"preprocessing: {name}: expected {expected}, came {value!r}")

    def _has_size(self) -> bool:
        return len(self.size) == 2 and all(1 <= side <= _LARGEST_SIDE for side in self.size)

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
        except (TypeError, ValueError, OverflowError) as cause:
            raise error(f"preprocessing: {cause} in {reprlib.repr(dict(values))}") from cause

    def to_dict(self) -> dict[str, Any]:
        """Return open_clip's dictionary form, JSON-ready."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def preprocess(
    source: ImageInput, config: PreprocessConfig, *, fast_decode: bool = False
) -> NDArray[np.uint8]:
    """Decode, resize, crop and convert one image.

    Args:
        source: a path, bytes, array or Pillow image.
        config: the model's preprocessing.
        fast_decode: let the decoder shrink JPEGs that are at least four times as large as needed,
            to no less than twice that. Their pixels then differ a little from open_clip's
            (benchmarks/fast_decode.py measures by how much); other images keep every bit.

    Returns:
        uint8 array (height, width, 3), RGB, 0-255.

    Raises:
        ImageError: the image cannot be decoded.
    """
    image, box = load_shrunk(source, partial(_enough, config=config) if fast_decode else None)
    return with_image_errors(source, lambda: _fitted(image, box, config))


def _fitted(image: Image.Image, box: Box | None, config: PreprocessConfig) -> NDArray[np.uint8]:
    """Resize, crop and convert the part of a decoded image that `box` bounds, None for all."""
    extent = image.size if box is None else (box[2] - box[0], box[3] - box[1])
    target = _target(extent, config)
    resampling = _RESAMPLING[config.interpolation]
    height, width = config.size
    if config.resize_mode != "shortest":
        image = image.resize(target, resampling, box)
    else:
        if height != width:  # open_clip ignores the configured interpolation there
            resampling = Image.Resampling.BICUBIC
        if target[0] * target[1] > _LARGEST_RESIZED_PIXELS:
            image = ImageOps.fit(image, (width, height), resampling)
        else:
            image = image.resize(target, resampling, box)
    if image.size != (width, height):
        fill = config.fill_color if config.resize_mode == "longest" else 0
        image = _centre_crop(image, config.size, fill)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _target(size: tuple[float, float], config: PreprocessConfig) -> Size:
    """Return the width and height to which an image of some size is resized before the crop."""
    height, width = config.size
    if config.resize_mode == "squash":
        return width, height
    if config.resize_mode == "shortest" and height == width:
        # torchvision truncates the long side, it does not round it
        short, long = sorted(size)
        scaled = int(width * long / short)
        return (width, scaled) if size[0] <= size[1] else (scaled, width)
    ratios = size[1] / height, size[0] / width
    ratio = max(ratios) if config.resize_mode == "longest" else min(ratios)
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _enough(size: Size, config: PreprocessConfig) -> Size:
    """Return the size to which a JPEG's decoder may shrink it; Pillow does the rest better."""
    width, height = _target(size, config)
    return _MARGIN * width, _MARGIN * height


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
