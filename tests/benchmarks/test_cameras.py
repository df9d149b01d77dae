from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.cameras import CAMERAS, through, write_through
from benchmarks.cell import open_world
from capt_deploy.core.errors import ConfigError


def photo(colour: tuple[int, int, int] = (200, 120, 60)) -> Image.Image:
    """Return a photo of 64 px, half one colour and half black."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = colour
    return Image.fromarray(pixels)


def taken(camera: str, image: Image.Image, seed: int = 0) -> np.ndarray:
    file = io.BytesIO(through(CAMERAS[camera], image, seed))
    pixels: np.ndarray = np.asarray(Image.open(file), np.float64) / 255
    assert pixels.shape == (*image.size, 3)
    return pixels


def test_each_camera_does_what_it_says() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    red, green, blue = taken("indoor", grey).mean(axis=(0, 1))
    assert red > green > blue + 0.1
    webcam = taken("webcam", grey)
    assert webcam[28:36, 28:36].mean() > webcam[:8, :8].mean() + 0.03
    assert webcam[..., 1].mean() > webcam[..., 0].mean()
    spread = np.ptp(taken("webcam", photo())[16:48, 8:24].mean(axis=(0, 1)))
    assert spread < 0.5 * (200 - 60) / 255
    # three stops: an eighth of the light
    assert taken("dim", grey).mean() == pytest.approx((0.502**2.2 / 8) ** (1 / 2.2), abs=0.02)
    expected = 0.8 * (0.25 * np.array([200, 120, 60]) + 0.75 * 137.1) / 255 + 0.1
    faded = taken("faded", photo())[8:56, 8:24].mean(axis=(0, 1))
    assert faded == pytest.approx(expected, abs=0.02)


def test_noise_is_of_the_seed() -> None:
    for camera in ("indoor", "webcam", "dim"):
        first, same, other = (through(CAMERAS[camera], photo(), seed) for seed in (1, 1, 2))
        assert first == same != other


def test_a_folder_keeps_its_layout(tmp_path: Path) -> None:
    for name in ("train/a_b/1.png", "train/a_b/2.png", "test/c/1.png"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        photo().save(tmp_path / "from" / name)
    for target in ("to", "again"):
        write_through("dim", tmp_path / "from", tmp_path / target)
    files = sorted(
        path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*.*")
    )
    assert files == ["test/c/1.jpg", "train/a_b/1.jpg", "train/a_b/2.jpg"]
    contents = [(tmp_path / "to" / name).read_bytes() for name in files]
    assert contents == [(tmp_path / "again" / name).read_bytes() for name in files]
    assert len({*contents}) == 3  # each file has its own noise


def test_a_world_through_a_camera_is_a_data_set() -> None:
    with open_world("pictograms@faded") as world:
        files = list(Path(world.data).rglob("*.jpg"))
        assert {file.parent.parent.name for file in files} == {"train", "val", "test"}
    with pytest.raises(ConfigError, match="webcam"), open_world("pictograms@hubble"):
        pass
