"""Search settings on validation images, over several worlds; `test` is never looked at.

    python -m benchmarks.search --try visual_epochs=8 --try visual_epochs=12,adapter_blocks=5

Each trial is the default method (`--try default`) with some settings changed;
`added=mixture+retrieval` and `without=infonce` switch parts. Printed is the gain in harmonic mean
over CoOp on the same images. Validation images of base classes have been used for early stopping,
strength and temperature; those of new classes for nothing.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import click

from benchmarks.ablation import DEFAULT, DOCS, config_of
from benchmarks.cell import fill, open_world
from benchmarks.record import load_cells, write_docs
from capt_deploy.core.console import Command
from capt_deploy.core.errors import DataError
from capt_train.cli.train import parse_settings
from capt_train.config import TrainConfig

_NAME = "search"
_COOP = "CoOp"


@click.command(cls=Command)
@click.option("--worlds", default="cifar100,cifar100-camera,pictograms", show_default=True)
@click.option("--try", "trials", multiple=True, metavar="NAME=VALUE,…", help="One trial.")
@click.option("--seeds", default="1", show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--docs", is_flag=True, help="Write the table into docs/ablation.md as well.")
def main(worlds: str, trials: tuple[str, ...], seeds: str, shots: int, docs: bool) -> None:
    """Measure CoOp and every trial; print what is known so far."""
    for world in worlds.split(","):
        with open_world(world) as place:
            for seed in (int(text) for text in seeds.split(",")):
                start = config_of(place, DEFAULT, shots, seed)
                for trial in (_COOP, *trials):
                    own = {"world": world, "tried": trial, "seed": seed, "shots": shots}
                    key = f"{world} / {trial} / {shots} / {seed}"
                    fill(_NAME, key, own, _changed(start, trial), "val")
    table = _table(load_cells(_NAME))
    click.echo(table)
    if docs:
        write_docs(DOCS, _NAME, table)


def _changed(config: TrainConfig, trial: str) -> TrainConfig:
    if trial == "default":
        return config
    if trial == _COOP:
        return TrainConfig.from_dict({**config.to_dict(), "method": "coop"}, DataError)
    settings = parse_settings(tuple(trial.split(",")))
    switched: dict[str, Any] = {
        name: settings.pop(name).split("+") for name in ("added", "without") if name in settings
    }
    changed = TrainConfig.from_dict({**config.to_dict(), **switched}, DataError)
    return changed.with_settings(settings)


def _table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    worlds = list(dict.fromkeys(cell["world"] for cell in cells.values()))
    lines = ["| trial | shots | " + " | ".join(worlds) + " |", "|---" * (len(worlds) + 2) + "|"]
    tried = {(cell["shots"], cell["tried"]) for cell in cells.values()}
    for shots, trial in sorted(tried, key=lambda own: (-own[0], own[1])):
        texts = []
        for world in worlds:
            gains = [
                100 * (cell["harmonic"] - coop["harmonic"])
                for cell in cells.values()
                if (cell["tried"], cell["shots"], cell["world"]) == (trial, shots, world)
                and (coop := cells.get(f"{world} / {_COOP} / {cell['shots']} / {cell['seed']}"))
            ]
            texts.append(f"{statistics.mean(gains):+.1f} ({len(gains)})" if gains else "-")
        lines.append(f"| {trial} | {shots} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
