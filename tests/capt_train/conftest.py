"""Configurations and arguments of the tiny run, and one that is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capt_train.config import TrainConfig
from capt_train.pipeline import train


@pytest.fixture(scope="session")
def configure(photos: Path, tiny_model_dir: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes the configuration of a run of a second."""

    def configure(**settings: Any) -> TrainConfig:
        tiny = {"shots": 3, "epochs": 3, "warmup_epochs": 1, "device": "cpu"}
        own: dict[str, Any] = {"data": str(photos), "model": f"local-dir:{tiny_model_dir}"}
        return TrainConfig(**{**own, **tiny, **settings})

    return configure


@pytest.fixture(scope="session")
def finished(
    configure: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a finished run on the base classes; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(configure(classes="base"), folder)
    return folder


@pytest.fixture
def inputs(photos: Path, tiny_model_dir: Path) -> list[str]:
    """Return the arguments of a run of a second, all but --shots and --out."""
    arguments = ["--data", str(photos), "--model", f"local-dir:{tiny_model_dir}"]
    return [*arguments, "--device", "cpu", "--set", "epochs=2"]


@pytest.fixture
def base(inputs: list[str]) -> list[str]:
    """Return the arguments of a run of a second, all but --out."""
    return [*inputs, "--shots", "3"]
