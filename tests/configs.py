"""Configurations from keywords: `tuning_epochs=3` stands for `tuning.epochs`."""

from __future__ import annotations

from typing import Any

from capt_train.config import TrainConfig, settings

NAMES = {name.replace(".", "_"): name for name in settings()}


def train_config(data: str = "", model: str = "", **values: Any) -> TrainConfig:
    """Return the default settings with some values changed."""
    return changed(TrainConfig(data, model), **values)


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """Return a copy with some values changed."""
    return config.with_settings({NAMES[name]: value for name, value in values.items()})
