"""Tune once and measure: the unit of the ablation, of confidence and of training speed."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cameras import CAMERAS, write_through
from capt_deploy.core.errors import ConfigError
from capt_deploy.evaluation.evaluate import Report
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.run.evaluate import evaluate_run
from examples.demo.world import write_world

_ROOT = Path(__file__).parents[1]
SHARED = _ROOT.parent / "shared"
_ALL_CLASSES = ("clothes", "grocery")  # worlds whose users have photos of every class
_EMBEDDED: set[str] = set()  # data sets whose embeddings this process has cached
_FITTED = ("temperature", "strength", "trained_parameters")


@dataclass(frozen=True)
class World:
    """A data set with a model for it."""

    data: str
    model: str
    classes: str = "base"  # classes to tune on


@contextmanager
def open_world(name: str) -> Iterator[World]:
    """Yield `pictograms`, rendered into a temporary folder, or a photo set of ../shared.

    `objects@webcam` is `objects` through the camera of that name; see benchmarks/cameras.py.

    Raises:
        ConfigError: there is no such world or camera.
    """
    name, _, camera = name.partition("@")
    if camera and camera not in CAMERAS:
        raise ConfigError(f"camera {camera!r}: expected one of {', '.join(CAMERAS)}")
    photos = SHARED / "data" / name
    if name != "pictograms" and not (photos / "test").is_dir():
        raise ConfigError(f"world {name!r}: expected pictograms or a folder of {photos.parent}")
    with tempfile.TemporaryDirectory() as folder:
        model = SHARED / "models" / "lit-efficientnet"
        if name == "pictograms":
            photos, model = Path(folder) / "pictograms", _ROOT / "examples/demo/model"
            write_world(photos)
        elif name.startswith("cifar100"):
            model = SHARED / "models" / "tinyclip-cifar"
        if camera:
            source, photos = photos, Path(folder) / camera
            write_through(camera, source, photos)
        classes = "all" if name in _ALL_CLASSES else "base"
        yield World(str(photos), f"local-dir:{model}", classes)


def measure(config: TrainConfig, split: str) -> dict[str, Any]:
    """Tune, evaluate and return figures; the frozen embeddings are cached before the clock starts.

    Args:
        config: settings of the run.
        split: the images to measure on.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if config.data not in _EMBEDDED:
            everything = replace(config, shots=None, method="zeroshot", added=(), without=())
            train(everything, Path(folder) / "first")
            _EMBEDDED.add(config.data)
        started = time.perf_counter()
        report = train(config, run)
        seconds = time.perf_counter() - started
        if split != report["split"]:
            report = {**report, **evaluate_run(run, config.data, split)}
    return {**figures(report), "seconds": seconds, **{name: report[name] for name in _FITTED}}


def figures(report: Report) -> dict[str, Any]:
    """Return the accuracies, calibration errors and shares of pairs; None for no such classes."""
    values: dict[str, Any] = {"harmonic": report["harmonic_mean"]}
    for scope in ("base", "new", "all"):
        metrics = report[scope] or {}
        values[scope] = metrics.get("accuracy")
        values[f"ece_15_{scope}"] = metrics.get("ece_15")
    counts = report["confusion"]["counts"]
    # shares of one total, so that the two can be compared
    errors = max(1, counts["zero_shot_errors_in_pairs"])
    recovered, broken = counts["recovered"] / errors, counts["broken"] / errors
    return {**values, "recovered": recovered, "broken": broken}
