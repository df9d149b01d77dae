"""What several files of these tests share."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt_deploy.bundle.read import REFERENCE

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


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the committed bundle; see tests/golden/make.py."""
    return Path(__file__).parents[1] / "golden" / "tiny.capt"


@pytest.fixture
def with_reference(golden: Path, tmp_path: Path) -> Callable[[bytes], Path]:
    """Return a function that gives a copy of the committed bundle some `reference.safetensors`."""

    def make(content: bytes) -> Path:
        bundle = tmp_path / "with_reference.capt"
        shutil.copytree(golden, bundle)
        (bundle / REFERENCE).write_bytes(content)
        manifest = json.loads((bundle / "manifest.json").read_text())
        record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest["files"][REFERENCE] = record
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        return bundle

    return make
