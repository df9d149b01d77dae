"""One run of `capt-train`, measured: the unit of ablation and search."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.record import add_cells, describe, load_cells
from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError, RunError
from capt_deploy.core.files import read_json
from capt_deploy.evaluation.evaluate import Report
from capt_train.config import TrainConfig
from capt_train.parts import GROUPS
from capt_train.pipeline import train
from capt_train.run.evaluate import evaluate_run
from capt_train.run.folder import RESULT
from examples.demo.world import write_world

_ROOT = Path(__file__).parents[1]
_SHARED = _ROOT.parent / "shared"
_PLACES = {"data", "model", "class_names", "device"}  # not part of what was measured
_OF_VISUAL_SIDE = {
    *("adapter_blocks", "adapter_scale", "adapter_exponent", "experts", "expert_rank"),
    *("visual_depth", "visual_tokens", "views", "visual_learning_rate"),
    *("text_rate_beside_visual", "visual_epochs", "consistency"),
    *("far_epochs", "far_patience", "far_consistency", "strength"),
}

_OF_COLOURS = {"colour_steps", "colour_learning_rate"}
# Settings that came after cells had been measured, with what leaves their runs as they were: it is
# left out, so that these cells stay. (On right labels there is no label noise.)
_LATER = {"calibrator": "temperature", "label_noise": "auto"}


@dataclass(frozen=True)
class World:
    """A data set with a model for it."""

    data: str
    model: str


@contextmanager
def open_world(name: str) -> Iterator[World]:
    """Yield `pictograms`, rendered into a folder that lives as long, or a photo set of ../shared.

    Raises:
        ConfigError: there is no such world.
    """
    if name == "pictograms":
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "pictograms"
            write_world(data)
            yield World(str(data), f"local-dir:{_ROOT / 'examples/demo/model'}")
    elif (_SHARED / "data" / name / "test").is_dir():
        model = _SHARED / "models" / "tinyclip-cifar"
        yield World(str(_SHARED / "data" / name), f"local-dir:{model}")
    else:
        raise ConfigError(f"world {name!r}: expected pictograms or a folder of {_SHARED / 'data'}")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return what decides a run's outcome, without where things lie on this machine."""
    idle = _PLACES
    idle = idle if config.parts & {*GROUPS["visual"]} else idle | _OF_VISUAL_SIDE
    idle = idle if "colours" in config.parts else idle | _OF_COLOURS
    values = config.to_dict().items()
    own = {name: value for name, value in values if name not in idle}
    before = {name: value for name, value in own.items() if (name, value) not in _LATER.items()}
    return {**before, "parts": sorted(config.parts)}  # a method may get others


def fill(
    name: str,
    key: str,
    own: Mapping[str, Any],
    config: TrainConfig,
    split: str,
    again: bool = False,
    measured: Callable[[TrainConfig, str], dict[str, Any]] | None = None,
) -> None:
    """Measure one cell of `results/NAME.json`, unless it is there with the same settings.

    Args:
        name: of the file.
        key: of the cell in it.
        own: what the cell says of itself besides its figures.
        config: of the run.
        split: which images it is measured on.
        again: measure even if it is there.
        measured: how, instead of by `measure`.
    """
    cells, settings = load_cells(name), settings_of(config)
    if not again and key in cells and cells[key]["settings"] == settings:
        return
    say(f"{name}: {key}")
    figures = (measured or measure)(config, split)
    cell = {**figures, **own, "settings": settings, "measured": describe()}
    add_cells(name, {key: cell})


def measure(
    config: TrainConfig, split: str, also: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Tune and evaluate; embeddings of the frozen model are made before the clock starts.

    Args:
        config: of the run.
        split: which images it is measured on.
        also: further data sets, of whose tuned classes the accuracy is returned under their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(replace(config, method="zeroshot", added=(), without=()), Path(folder) / "first")
        started = time.perf_counter()
        report = train(config, run)
        seconds = time.perf_counter() - started
        if split != report["split"]:
            report = {**report, **evaluate_run(run, config.data, split)}
        result = read_json(run / RESULT, RunError)
        others = {
            name: evaluate_run(run, data, split, "base")["base"]["accuracy"]
            for name, data in (also or {}).items()
        }
    return {**figures(report), **others, "seconds": seconds, **_fitted(report, result)}


def figures(report: Report) -> dict[str, Any]:
    """Return what the tables show of a report."""
    found: dict[str, Any] = {"harmonic": report["harmonic_mean"]}
    for scope in ("base", "new", "all"):
        found[scope] = report[scope]["accuracy"]
    for scope in ("base", "new"):
        found[f"nll_{scope}"] = report[scope]["nll"]
        for bins in ("ece_10", "ece_15"):
            found[f"{bins}_{scope}"] = report[scope][bins]
            found[f"{bins}_{scope}_uncalibrated"] = report["uncalibrated"][scope][bins]
    counts = report["confusion"]["counts"]
    # of the same whole, so that the two can be compared
    errors = max(1, counts["zero_shot_errors_in_pairs"])
    return {
        **found,
        "recovered": counts["recovered"] / errors,
        "broken": counts["broken"] / errors,
        "counts": counts,
    }


def _fitted(report: Report, result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("temperature", "strength", "mixture", "trained_parameters")
    return {**{name: report[name] for name in names}, "strength_trial": result["trial"]}
