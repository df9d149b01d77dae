"""What each method and part gives on real photos: accuracy, calibration, cost.

    python -m benchmarks.ablation --world grocery

Cells that are measured stay in benchmarks/results/ablation-WORLD.json; missing cells are measured.
`--again` measures anew, `--only-table` prints the measured ones, `--split val` is for decisions.
"""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.cell import World, measure, open_world
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_train.config import TrainConfig

WORLDS = ("clothes", "grocery", "objects", "cifar100", "cifar100-camera")
DEFAULT = "capt (default)"
ROWS: Mapping[str, Mapping[str, Any]] = {
    "zero-shot": {"method": "zeroshot"},
    "CoOp": {"method": "coop"},
    "CoOp, as in its paper": {"method": "coop-paper"},
    "GDA": {"method": "rows", "rows.weight": 1.0},
    "ridge map": {"method": "map"},
    DEFAULT: {},
    "− prompt": {"without": ("prompt",)},
    "− map": {"without": ("map",)},
    "− rows": {"without": ("rows",)},
    "− colours": {"without": ("colours",)},
    "− CoA": {"without": ("coa",)},
    "− InfoNCE": {"without": ("infonce",)},
    "+ TCPT": {"added": ("tcpt",)},
    "+ mixture": {"added": ("mixture",)},
    "+ retrieval": {"added": ("retrieval",)},
    "+ semantic experts": {"added": ("semantic-experts",)},
    "+ adapter": {"added": ("adapter",)},
    "+ sample experts": {"added": ("sample-experts",)},
    "+ LoRA": {"added": ("lora",)},
}
# Rows that every number of shots shows; the others have 16 alone
MAIN = ("zero-shot", "CoOp", "GDA", "ridge map", DEFAULT)
# Title, key of the cell, and whether it is a share, shown in %
COLUMNS = (
    ("tuned", "base", True),
    ("new", "new", True),
    ("harmonic", "harmonic", True),
    ("all", "all", True),
    ("ECE tuned", "ece_15_base", True),
    ("ECE new", "ece_15_new", True),
    ("ECE all", "ece_15_all", True),
    ("recovered", "recovered", True),
    ("broken", "broken", True),
    ("numbers", "trained_parameters", False),
)
# What the default should reach, in %: column, then 16, 4 and 1 shots (None: no goal)
GOALS: Mapping[str, Mapping[str, Sequence[float | None]]] = {
    "clothes": {"all": (81, 70, 52)},
    "grocery": {"all": (66, 55, 37)},
    "objects": {
        "base": (76, None, None),
        "new": (51, None, None),
        "harmonic": (61, 60, None),
        "all": (55, None, None),
    },
    "cifar100": {"harmonic": (55.0, None, None)},
    "cifar100-camera": {"harmonic": (54.4, None, None)},
    "pictograms": {"harmonic": (84, None, None)},
}
_SEEDS, _SHOTS = 3, (16, 4, 1)
DOCS = Path(__file__).parents[1] / "docs" / "ablation.md"
README = Path(__file__).parents[1] / "README.md"


@click.command(cls=Command)
@click.option("--world", required=True, help="pictograms, or a photo set of ../shared/data.")
@click.option("--rows", help="Some rows, separated by |; by default the main ones.")
@click.option("--shots", default="16,4,1", show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--again", is_flag=True, help="Measure these cells anew.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--split", default="test", show_default=True, help="val measures and keeps nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/ablation.md as well.")
def main(
    world: str,
    rows: str | None,
    shots: str,
    seeds: str,
    again: bool,
    only_table: bool,
    split: str,
    docs: bool,
) -> None:
    """Measure the cells that are missing, one after the other, and print the table."""
    names = rows.split("|") if rows else list(MAIN)
    if unknown := [row for row in names if row not in ROWS]:
        raise click.UsageError(f"--rows: {unknown} not among {' | '.join(ROWS)}")
    numbers = _numbers(shots), _numbers(seeds)
    if split != "test":
        click.echo(markdown(dict(_cells(world, names, *numbers, split))))
        return
    if not only_table:
        known = {} if again else load(world)
        for key, cell in _cells(world, names, *numbers, split, known):
            add_cells(f"ablation-{world}", {key: cell})
    table = markdown(load(world))
    click.echo(table)
    if docs:
        write_docs(DOCS, world, markdown(load(world)))
        write_docs(DOCS, "goals", goals({name: load(name) for name in GOALS}))
        worlds = {name: load(name) for name in WORLDS}
        write_docs(DOCS, "overview", overview(worlds))
        write_docs(README, "overview", overview(worlds, shots=(16, 4)))
        write_docs(README, "ece", errors(worlds))


def _cells(
    world: str,
    rows: list[str],
    shots: list[int],
    seeds: list[int],
    split: str,
    known: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure and yield the cells that are not known, by `row / shots / seed`."""
    with open_world(world) as place:
        # Seeds are the outer loop, so that an interrupted table has all rows.
        for count, seed, row in ((c, s, r) for c in shots for s in seeds for r in rows):
            key = f"{row} / {count} / {seed}"
            if key not in known:
                say(f"ablation-{world}: {key}")
                values = measure(config_of(place, row, count, seed), split)
                yield key, {"row": row, "shots": count, "seed": seed, **values}


def config_of(place: World, row: str, shots: int, seed: int) -> TrainConfig:
    """Return the settings of one cell's run."""
    config = TrainConfig(place.data, place.model, classes=place.classes, shots=shots, seed=seed)
    return config.with_settings(ROWS[row])


def load(world: str) -> dict[str, dict[str, Any]]:
    """Return the cells that are measured, by `row / shots / seed`."""
    return load_cells(f"ablation-{world}")


def markdown(cells: Mapping[str, Mapping[str, Any]], shots: Collection[int] = _SHOTS) -> str:
    """Return a table for each number of shots: mean ± std, and the seeds if they are not three.

    Columns without a value are left out.
    """
    columns = [
        column for column in COLUMNS if any(cell[column[1]] is not None for cell in cells.values())
    ]
    parts = []
    for count in sorted({cell["shots"] for cell in cells.values()} & {*shots}, reverse=True):
        lines = [
            f"### {count} {'shots' if count > 1 else 'shot'}",
            "",
            "| | " + " | ".join(title for title, *_ in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in ROWS:
            if measured := cells_of(cells, row, count):
                texts = (mean(measured, key, share) for _, key, share in columns)
                lines.append(f"| {row} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def overview(
    worlds: Mapping[str, Mapping[str, Mapping[str, Any]]], shots: Sequence[int] = _SHOTS
) -> str:
    """Return one table of the main rows: all classes, or base / new where half are tuned on."""
    lines = ["| shots | | " + " | ".join(worlds) + " |", "|---" * (len(worlds) + 2) + "|"]
    for count in shots:
        for row in MAIN:
            texts = [_short(cells_of(cells, row, count)) for cells in worlds.values()]
            if any(texts):
                lines.append(f"| {count} | {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def errors(worlds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return one table of the ECE with 16 shots: all classes, or tuned / new / all."""
    lines = ["| 16 shots, ECE-15 | " + " | ".join(worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
    for row in ("zero-shot", "CoOp", DEFAULT):
        texts = []
        for cells in worlds.values():
            measured = cells_of(cells, row, 16)
            scopes = ("base", "new", "all") if measured and measured[0]["new"] else ("all",)
            values = [f"{percent(measured, f'ece_15_{s}'):.1f}" for s in scopes if measured]
            texts.append(" / ".join(values))
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _short(cells: list[Mapping[str, Any]]) -> str:
    if not cells:
        return ""
    if cells[0]["new"] is None:
        return f"{percent(cells, 'all'):.1f}"
    return f"{percent(cells, 'base'):.1f} / {percent(cells, 'new'):.1f}"


def goals(worlds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a table of the default's goals and of the figures reached.

    Args:
        worlds: by name: the cells.
    """
    titles = {key: title for title, key, _ in COLUMNS}
    lines = ["| world | shots | column | goal | reached | |", "|---" * 6 + "|"]
    for world, cells in worlds.items():
        for key, wanted in GOALS[world].items():
            for count, goal in zip(_SHOTS, wanted, strict=True):
                measured = cells_of(cells, DEFAULT, count)
                if goal is None or not measured:
                    continue
                reached = percent(measured, key)
                verdict = "met" if reached >= goal else "**missed**"
                lines.append(
                    f"| {world} | {count} | {titles[key]} | {goal:g} | {reached:.1f} | {verdict} |"
                )
    return "\n".join(lines)


def cells_of(
    cells: Mapping[str, Mapping[str, Any]], row: str, shots: int
) -> list[Mapping[str, Any]]:
    """Return the cells of a row, one for each seed that is measured."""
    return [cell for cell in cells.values() if (cell["row"], cell["shots"]) == (row, shots)]


def percent(cells: list[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a share, in %."""
    return 100 * float(statistics.mean(cell[key] for cell in cells))


def mean(cells: list[Mapping[str, Any]], key: str, share: bool) -> str:
    """Return mean ± standard deviation, and the number of seeds where there are not three."""
    values = [cell[key] * (100 if share else 1) for cell in cells if cell[key] is not None]
    if not values:
        return "-"
    middle = statistics.mean(values)
    if not share:
        return f"{middle:,.0f}"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    seeds = "" if len(values) == _SEEDS else f" ({len(values)})"
    return f"{middle:.1f}{spread}{seeds}"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as cause:
        raise click.UsageError(f"expected numbers separated by commas, came {text!r}") from cause


if __name__ == "__main__":
    main()
