"""What a shared prompt reaches that is tuned on the test images themselves.

    python -m benchmarks.headroom --world cifar100

This is no result of a method, for it has seen what it is asked, base and new classes alike. It says
about how much is there to be found. It is no strict bound: the loss is cross-entropy among all
classes, while base and new are measured among their own.
"""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import ablation
from benchmarks.cell import World, figures, open_world
from benchmarks.record import add_cells, describe, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_deploy.data.datasets import read_dataset
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.method.learner import make_learner
from capt_train.pipeline import train
from capt_train.run.evaluate import score_model
from capt_train.run.folder import load_run
from capt_train.tune.stages import Stage, TuningTask
from capt_train.tune.tune import tune

NAME = "headroom"
COLUMNS = ("base", "new", "harmonic", "all", "recovered", "broken")
_EPOCHS, _BATCH, _SEED = 12, 128, 1


@click.command(cls=Command)
@click.option("--world", help="Of the ablation; by default all.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/ablation.md as well.")
def main(world: str | None, only_table: bool, docs: bool) -> None:
    """Measure a world, and print what is measured."""
    for name in () if only_table else (world,) if world else ablation.GOALS:
        say(f"{NAME}: {name}")
        with open_world(name) as place:
            found = measure(place)
        add_cells(NAME, {name: {**found, "measured": describe()}})
    table = markdown(load_cells(NAME))
    click.echo(table)
    if docs:
        write_docs(ablation.DOCS, NAME, table)


def measure(place: World) -> dict[str, Any]:
    """Return the figures of a shared context that is tuned on all test images."""
    with tempfile.TemporaryDirectory() as folder:
        # Its evaluation knows the classes, their halves and the mined pairs
        train(ablation.config_of(place, "CoOp", 16, _SEED), Path(folder) / "run")
        model = load_run(Path(folder) / "run", torch.device("cpu"))
        dataset = read_dataset(place.data)
        everything = tuple(range(len(model.class_names)))
        config = replace(model.config, epochs=_EPOCHS, batch_size=_BATCH, label_noise="0")
        learner = make_learner(
            model.backbone, config, replace(model.split, tuned=everything), model.zero_shot
        )
        fingerprint = str(model.provenance["model_sha256"])
        with closing(EmbeddingCache(fingerprint, "cpu")) as cache:
            images = embed(model.backbone, cache, dataset, dataset.items("test"), "test images")
            none = images.rows(torch.empty(0, dtype=torch.long))
            scale, reference = model.backbone.scale, model.zero_shot
            task = TuningTask(scale, everything, images, none, reference, config)
            tune(learner, task, Path(folder), Stage("", _EPOCHS, config.learning_rate))
            tuned = replace(model, learner=learner, text_embeddings=learner.mean_texts(everything))
            return figures(score_model(tuned, cache, dataset, "test").report())


def markdown(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return CoOp's row of the ablation and below it that of the context tuned on test images."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for world, cell in cells.items():
        runs = ablation.cells_of(ablation.load(world), "CoOp", 16)
        for title, rows in ((f"{world}, CoOp, 16 shots", runs), ("tuned on `test`", [cell])):
            texts = [f"{ablation.percent(rows, key):.1f}" for key in COLUMNS]
            lines.append(f"| {title} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
