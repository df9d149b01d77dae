"""What each part of the method adds to CoOp: accuracy, calibration, confusion, cost.

    python -m benchmarks.ablation --world cifar100

Every row of the table but the last three is CoOp with one part added. Cells that are measured stay
in benchmarks/results/ablation-WORLD.json; missing cells are measured. `--again` measures anew,
`--only-table` prints the measured ones.
"""

import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.cell import World, measure, open_world
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_train.config import TrainConfig
from capt_train.parts import GROUPS

DEFAULT = "capt (default)"
ROWS: Mapping[str, Mapping[str, Any]] = {
    "zero-shot": {"method": "zeroshot"},
    "CoOp": {"method": "coop"},
    "+ CoA": {"method": "coop", "added": ("coa",)},
    "+ TCPT": {"method": "coop", "added": ("tcpt",)},
    "+ bank, InfoNCE": {"method": "coop", "added": ("bank",)},
    "+ colours": {"method": "coop", "added": ("colours",)},
    "+ adapter": {"method": "coop", "added": ("adapter",), "visual.strength": 1.0},
    "+ semantic experts": {"method": "coop", "added": ("semantic-experts",)},
    "+ sample experts": {"method": "coop", "added": ("sample-experts",), "visual.strength": 1.0},
    "+ mixture": {"method": "coop", "added": ("mixture",)},
    "all": {"method": "full"},
    "all, κ = 1": {"method": "full", "visual.strength": 1.0},
    DEFAULT: {"method": "capt"},
}
# Title, key of the cell, and whether it is a share, shown in %.
COLUMNS = (
    ("base", "base", True),
    ("new", "new", True),
    ("harmonic", "harmonic", True),
    ("all classes", "all", True),
    ("ECE-10 base", "ece_10_base", True),
    ("ECE-10 new", "ece_10_new", True),
    ("ECE-15 base", "ece_15_base", True),
    ("ECE-15 new", "ece_15_new", True),
    ("ECE-15 new, uncal.", "ece_15_new_uncalibrated", True),
    ("recovered", "recovered", True),
    ("broken", "broken", True),
    ("parameters", "trained_parameters", False),
    ("seconds", "seconds", False),
)

# What the default should gain over CoOp in harmonic mean, in points (on the last: anything)
GOALS: Mapping[str, float] = {"cifar100": 1.0, "cifar100-camera": 8.0, "pictograms": 0.0}
_SEEDS = 3
DOCS = Path(__file__).parents[1] / "docs" / "ablation.md"


@click.command(cls=Command)
@click.option("--world", required=True, help="pictograms, or a photo set of ../shared/data.")
@click.option("--rows", help="Some rows, separated by |; by default all.")
@click.option("--shots", default="16,4,1", show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--again", is_flag=True, help="Measure these cells anew.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/ablation.md as well.")
def main(
    world: str, rows: str | None, shots: str, seeds: str, again: bool, only_table: bool, docs: bool
) -> None:
    """Measure the cells that are missing, one after the other, and print the table."""
    names = rows.split("|") if rows else list(ROWS)
    if unknown := [row for row in names if row not in ROWS]:
        raise click.UsageError(f"--rows: {unknown} not among {' | '.join(ROWS)}")
    if not only_table:
        _measure(world, names, _numbers(shots), _numbers(seeds), again)
    table = markdown(load(world))
    click.echo(table)
    if docs:
        write_docs(DOCS, world, markdown(load(world), shots=(16,)))
        write_docs(DOCS, "goals", goals({name: load(name) for name in GOALS}))


def _measure(world: str, rows: list[str], shots: list[int], seeds: list[int], again: bool) -> None:
    with open_world(world) as place:
        # Seeds are the outer loop, so that an interrupted table has all rows.
        for count, seed, row in ((c, s, r) for c in shots for s in seeds for r in rows):
            key = f"{row} / {count} / {seed}"
            if key in load(world) and not again:
                continue
            say(f"ablation-{world}: {key}")
            values = measure(config_of(place, row, count, seed), "test")
            cell = {"row": row, "shots": count, "seed": seed, **values}
            add_cells(f"ablation-{world}", {key: cell})


def config_of(place: World, row: str, shots: int, seed: int) -> TrainConfig:
    """Return the settings of one cell's run."""
    config = TrainConfig(place.data, place.model, classes="base", shots=shots, seed=seed)
    alike = {"calibration.calibrator": "temperature"}  # for all rows
    return config.with_settings({**alike, **ROWS[row]})


def load(world: str) -> dict[str, dict[str, Any]]:
    """Return the cells that are measured, by `row / shots / seed`."""
    return load_cells(f"ablation-{world}")


def markdown(cells: Mapping[str, Mapping[str, Any]], shots: Collection[int] = (16, 4, 1)) -> str:
    """Return a table for each number of shots: mean ± std, and the seeds if they are not three."""
    parts = []
    for count in sorted({cell["shots"] for cell in cells.values()} & {*shots}, reverse=True):
        lines = [
            f"### {count} {'shots' if count > 1 else 'shot'}",
            "",
            "| | " + " | ".join(title for title, *_ in COLUMNS) + " | κ |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ]
        for row in ROWS:
            if measured := cells_of(cells, row, count):
                texts = (mean(measured, key, share) for _, key, share in COLUMNS)
                lines.append(f"| {row} | " + " | ".join(texts) + f" | {_strength(row, measured)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def goals(worlds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a table of the goals with 16 shots, and of the figures reached.

    Args:
        worlds: by name: the cells.
    """
    lines = ["| world | 16 shots, mean of the seeds | goal | reached | |", "|---" * 5 + "|"]
    ece = "ece_15_new_uncalibrated"
    for world, cells in worlds.items():
        frozen, coop, default = (
            {
                key: percent(cells_of(cells, row, 16), key)
                for key in ("harmonic", "new", ece, "recovered", "broken")
            }
            for row in ("zero-shot", "CoOp", DEFAULT)
        )
        gain, best_new = default["harmonic"] - coop["harmonic"], max(coop["new"], frozen["new"])
        rows = [
            ("harmonic mean over CoOp's", "≥", GOALS[world], gain),
            ("new, the better of CoOp's and zero-shot's", "≥", best_new, default["new"]),
            ("ECE-15 new, uncal.; CoOp's", "≤", coop[ece], default[ece]),
            ("recovered", "≥", 30.0, default["recovered"]),
            ("broken; a third of recovered", "≤", default["recovered"] / 3, default["broken"]),
        ]
        for title, sign, goal, reached in rows:
            met = reached >= goal if sign == "≥" else reached <= goal
            verdict = "met" if met else "**missed**"
            lines.append(f"| {world} | {title} | {sign} {goal:.2f} | {reached:.2f} | {verdict} |")
    return "\n".join(lines)


def cells_of(
    cells: Mapping[str, Mapping[str, Any]], row: str, shots: int
) -> list[Mapping[str, Any]]:
    """Return the cells of a row, one for each seed that is measured."""
    return [cell for cell in cells.values() if (cell["row"], cell["shots"]) == (row, shots)]


def percent(cells: list[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a share, in %."""
    return 100 * float(statistics.mean(cell[key] for cell in cells))


def _strength(row: str, cells: list[Mapping[str, Any]]) -> str:
    """Return the mean κ of a row with parts in the visual tower, else "-"."""
    parts = config_of(World("", ""), row, 1, 1).parts
    if not parts & {*GROUPS["visual"]}:
        return "-"
    return f"{statistics.mean(cell['strength'] for cell in cells):.2g}"


def mean(cells: list[Mapping[str, Any]], key: str, share: bool) -> str:
    """Return mean ± standard deviation, and the number of seeds where there are not three."""
    values = [cell[key] * (100 if share else 1) for cell in cells]
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
