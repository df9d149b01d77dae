"""What distance-aware calibration would change for classes outside training (METHOD 8).

    python -m benchmarks.dac

DAC (arXiv 2402.04655) multiplies an image's logits by a factor of its most probable class:
exp(−d) among the tuned embeddings over exp(−d) among the hand-written ones, d being the mean
Euclidean distance to the nearest tuned classes; tuned classes keep theirs. Runs on top of the
temperature; cells that are measured stay in benchmarks/results/dac.json.
"""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cell import World, open_world
from benchmarks.record import add_cells, describe, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_deploy.data.datasets import read_dataset
from capt_deploy.metrics.calibration import expected_calibration_error, softmax
from capt_train.calibrate.distance_aware import distance_aware_factors
from capt_train.config import TrainConfig
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.pipeline import train
from capt_train.run.folder import TunedModel, load_run

NAME = "dac"
DOCS = Path(__file__).parents[1] / "docs" / "export.md"
_SPLITS = ("val", "test")


@click.command(cls=Command)
@click.option("--worlds", default="cifar100,cifar100-camera,pictograms", show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--docs", is_flag=True, help="Write the table into docs/export.md as well.")
def main(worlds: str, seeds: str, docs: bool) -> None:
    """Tune a CoOp prompt per world and seed, and print the table."""
    cells = load_cells(NAME)
    for world, seed in product(worlds.split(","), map(int, seeds.split(","))):
        key = f"{world} / {seed}"
        if key not in cells:
            say(f"{NAME}: {key}")
            cells[key] = {"world": world, **_measure(world, seed), "measured": describe()}
            add_cells(NAME, {key: cells[key]})
    table = markdown(cells)
    click.echo(table)
    if docs:
        write_docs(DOCS, NAME, table)


def _measure(world: str, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    with open_world(world) as place, tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            *(place.data, place.model),
            method="coop",
            classes="base",
            seed=seed,
            calibrator="temperature",
        )
        train(config, Path(folder) / "run")
        model = load_run(Path(folder) / "run")
        return {split: _figures(model, place, split) for split in _SPLITS}


@torch.no_grad()
def _figures(model: TunedModel, place: World, split: str) -> dict[str, dict[str, float]]:
    """Return NLL and ECE-15 of images of new classes among these alone, and of all among all."""
    dataset = read_dataset(place.data, strict_names=False).aligned_to(model.class_names)
    with closing(EmbeddingCache(model.backbone.fingerprint(), "cpu")) as cache:
        features = embed(model.backbone, cache, dataset, dataset.items(split), f"{split} images")
    tuned = torch.tensor(model.tuned)
    factors = distance_aware_factors(model.text_embeddings, model.zero_shot, tuned)
    found = {}
    for scope, wanted in (("new", ~tuned), ("all", torch.ones_like(tuned))):
        columns, kept = wanted.nonzero()[:, 0], wanted[features.labels]
        logits = model.logits(features.embeddings)[kept][:, columns]
        labels, own = torch.searchsorted(columns, features.labels[kept]), factors[columns]
        scaled = logits * own[logits.argmax(dim=1)][:, None]
        found[scope] = {
            "factor": float(own.mean()),
            "nll": float(functional.cross_entropy(logits, labels)),
            "nll_dac": float(functional.cross_entropy(scaled, labels)),
            "ece": _ece(logits, labels),
            "ece_dac": _ece(scaled, labels),
        }
    return found


def _ece(logits: Tensor, labels: Tensor) -> float:
    return float(expected_calibration_error(softmax(logits.numpy()), np.asarray(labels)))


def markdown(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each world, split and scope, means over the seeds."""
    worlds = dict.fromkeys(cell["world"] for cell in cells.values())
    lines = [
        "| images, classes | seeds | mean γ | NLL | with DAC | ECE-15, % | with DAC |",
        "|---|---|---|---|---|---|---|",
    ]
    for world, split, scope in product(worlds, _SPLITS, ("new", "all")):
        own = [cell[split][scope] for cell in cells.values() if cell["world"] == world]
        figure = {key: mean(cell[key] for cell in own) for key in own[0]}
        line = [f"{world} {split}, {scope}", str(len(own)), f"{figure['factor']:.3f}"]
        line += [f"{figure[name]:.4f}" for name in ("nll", "nll_dac")]
        line += [f"{100 * figure[name]:.1f}" for name in ("ece", "ece_dac")]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
