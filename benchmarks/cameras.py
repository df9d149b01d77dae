"""Simulated cameras: whole data sets as a poor camera would have taken them.

Each works on linear light where light is concerned (white balance, exposure, shot noise) and on
sRGB-like values (gamma 2.2) elsewhere, as a camera's own pipeline does, and ends with a JPEG file.
"""

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Photo = NDArray[np.float64]  # (height, width, 3), RGB in [0, 1]

_PHOTOS = (".jpg", ".jpeg", ".png")
_GAMMA = 2.2
_LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601


@dataclass(frozen=True)
class Camera:
    """A camera's way from a good photo to its own JPEG."""

    help: str
    shoot: Callable[[Photo, np.random.Generator], Photo]
    quality: int  # of the JPEG file


def through(camera: Camera, photo: Image.Image, seed: int) -> bytes:
    """Return the JPEG file that a camera makes of a photo."""
    pixels = np.asarray(photo.convert("RGB"), np.float64) / 255
    taken = camera.shoot(pixels, np.random.default_rng(seed)).clip(0, 1)
    file = io.BytesIO()
    Image.fromarray((255 * taken).round().astype(np.uint8)).save(
        file, "JPEG", quality=camera.quality
    )
    return file.getvalue()


def write_through(camera: str, source: Path, target: Path) -> None:
    """Write all photos of a folder with `train`, `val` and `test` through a camera.

    The same photo has the same noise each time, and photos of different names different noise.
    """
    for path in sorted(file for file in source.rglob("*") if file.is_file()):
        name = path.relative_to(source)
        digest = hashlib.sha256(f"{camera} {name.as_posix()}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() not in _PHOTOS:  # names of classes
            shutil.copyfile(path, target / name)
            continue
        with Image.open(path) as photo:
            (target / name).with_suffix(".jpg").write_bytes(through(CAMERAS[camera], photo, seed))


def _indoor(photo: Photo, random: np.random.Generator) -> Photo:
    """Warm light of a lamp that the white balance misses."""
    light = photo**_GAMMA * [1.25, 0.9, 0.45]
    return _noisy(light, random, 0.02).clip(0) ** (1 / _GAMMA)


def _webcam(photo: Photo, random: np.random.Generator) -> Photo:
    """Soft, pale and greenish, dark towards the corners, with much noise."""
    height, width, _ = photo.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = _blurred(photo, 0.01) ** _GAMMA * (1 - 0.3 * (x**2 + y**2))[..., None]
    image = _noisy(light, random, 0.04).clip(0) ** (1 / _GAMMA)
    grey = (image @ _LUMA)[..., None]
    pale: Photo = 0.75 * (grey + 0.4 * (image - grey)) + [0.1, 0.14, 0.1]
    return pale


def _dim(photo: Photo, random: np.random.Generator) -> Photo:
    """Three stops underexposed, so that noise and rounding take a large share."""
    return _noisy(photo**_GAMMA / 8, random, 0.01).clip(0) ** (1 / _GAMMA)


def _faded(photo: Photo, random: np.random.Generator) -> Photo:
    """The shift of `cifar100-camera`: linear, so that a linear map undoes it."""
    faded: Photo = 0.8 * (0.25 * photo + 0.75 * (photo @ _LUMA)[..., None]) + 0.1
    return faded


def _noisy(light: Photo, random: np.random.Generator, deviation: float) -> Photo:
    """Return light with shot noise, which has that deviation at 1, and a tenth of it everywhere."""
    shot = np.sqrt(light.clip(0)) + 0.1
    noisy: Photo = light + deviation * shot * random.standard_normal(light.shape)
    return noisy


def _blurred(photo: Photo, share: float) -> Photo:
    """Return a photo blurred by a Gaussian, its deviation a share of the shorter side."""
    image = Image.fromarray((255 * photo).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(share * min(image.size)))) / 255


CAMERAS: Mapping[str, Camera] = {
    "indoor": Camera("phone under a warm lamp, white balance missed, some noise", _indoor, 70),
    "webcam": Camera("pale, greenish, soft, dark corners, much noise", _webcam, 50),
    "dim": Camera("three stops underexposed, noise", _dim, 80),
    "faded": Camera("colours at a quarter, contrast at 80 %: a linear shift", _faded, 95),
}
