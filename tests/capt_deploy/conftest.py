"""What several files of these tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CIFAR = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar100"


@pytest.fixture
def cifar() -> Path:
    if not CIFAR.is_dir():
        pytest.skip(f"the real photos of {CIFAR} are not here")
    return CIFAR


@pytest.fixture
def put_images(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small PNG under each of the given relative names."""

    def put(*names: str) -> Path:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
            Image.new("RGB", (9, 7), colour).save(path, "PNG")
        return tmp_path

    return put


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """Return a function that makes reproducible random pixels."""

    def make(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
        shape = (height, width, channels) if channels > 1 else (height, width)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make
