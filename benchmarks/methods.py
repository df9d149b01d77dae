"""Write the tables of docs/methods.md from what capt-compare has measured.

capt-compare benchmarks/compare/methods.json     # measures what is missing
capt-compare benchmarks/compare/promptkd.json
python -m benchmarks.methods                     # prints the tables; --docs writes them

"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from benchmarks.record import write_docs
from capt_deploy.core.console import Command
from capt_train.compare.plan import Plan, read_plan
from capt_train.compare.run import Lines, read_cells
from capt_train.compare.tables import Table, main_accuracy, percent, select, to_markdown

_COMPARE = Path(__file__).parent / "compare"
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"
VARIANT = "+ TCPT"
# The prompt methods that TCPT's claim is tested on; two towers count by their text side here
PROMPT_METHODS = (
    *("CoOp", "CoOp, class-specific", "KgCoOp", "ProGrad", "IVLP", "MaPLe", "PromptSRC"),
    *("TAC-style", "CoCoOp"),
)
_Value = Callable[[Mapping[str, Any]], float | None]


@click.command(cls=Command)
@click.option("--docs", is_flag=True, help="Write the tables into docs/methods.md as well.")
def main(docs: bool) -> None:
    """Print the tables of docs/methods.md."""
    for mark, text in texts().items():
        click.echo(f"{text}\n")
        if docs:
            write_docs(DOCS, mark, text)


def texts() -> dict[str, str]:
    """Return the tables by their marks in the page."""
    plan, cells = measured("methods")
    tables = {
        f"accuracy {shots}": to_markdown([by_data(plan, cells, shots, main_accuracy, "Accuracy")])
        for shots in (16, 4, 1)
    }
    for name in ("none", "temperature"):
        title = "ECE, not calibrated" if name == "none" else "ECE, with one temperature"
        table = by_data(plan, cells, 16, lambda cell, n=name: error(cell, n), title)  # type: ignore[misc]
        tables[f"ece {name}"] = to_markdown([table])
    tables["claim"] = to_markdown([claim(plan, cells)])
    tables["promptkd"] = to_markdown([distilled(*measured("promptkd"))])
    return tables


def measured(name: str) -> tuple[Plan, Lines]:
    """Return a configuration of benchmarks/compare and its cells that are measured."""
    plan = read_plan(_COMPARE / f"{name}.json")
    return plan, read_cells(_COMPARE / name, plan)


def by_data(plan: Plan, cells: Lines, shots: int, value: _Value, what: str) -> Table:
    """Return a table of methods by data sets, each without and with the terms of TCPT."""
    header = ["", *(part for data in plan.data for part in (data, VARIANT))]
    rows = []
    for method in dict.fromkeys(cell.method for cell in plan.cells):
        values = [
            percent_of(select(cells, data=data, shots=shots, method=method, variant=variant), value)
            for data in plan.data
            for variant in ("", VARIANT)
        ]
        if any(text != "–" for text in values):
            rows.append((method, *values))
    title = f"{what}, {shots} {'shots' if shots > 1 else 'shot'}, %"
    return Table(title, tuple(header), tuple(rows))


def percent_of(cells: Sequence[Mapping[str, Any]], value: _Value) -> str:
    """Return mean ± standard deviation over the seeds, with their number where it is not three."""
    text = percent(value(cell) for cell in cells)
    return text if len(cells) < 2 or len(cells) == 3 else f"{text} ({len(cells)})"


def error(cell: Mapping[str, Any], calibration: str) -> float | None:
    """Return the ECE among all classes, or the mean of those of tuned and of new classes."""
    errors = cell["ece"].get(calibration) or {}
    if errors.get("new") is None:
        return errors.get("all")
    return fmean((errors["base"], errors["new"]))


def claim(plan: Plan, cells: Lines) -> Table:
    """Return what the terms of TCPT change on `objects` with 16 shots, seed by seed."""
    header = ("", "tuned", "new", "ECE tuned", "ECE new", "ECE tuned, T", "ECE new, T", "seeds")
    rows = []
    for method in PROMPT_METHODS:
        pairs = _pairs(cells, method)
        if not pairs:
            continue
        changes = [
            _change(pairs, lambda cell, s=scope: cell[s])  # type: ignore[misc]
            for scope in ("base", "new")
        ]
        changes += [
            _change(pairs, lambda cell, n=name, s=scope: cell["ece"][n][s])  # type: ignore[misc]
            for name in ("none", "temperature")
            for scope in ("base", "new")
        ]
        rows.append((method, *changes, str(len(pairs))))
    note = (
        "Each entry: without the terms → with them. T: after one temperature, fitted on validation "
        "photos of the tuned classes."
    )
    return Table("TCPT's terms on prompt methods, objects, 16 shots, %", header, tuple(rows), note)


def _pairs(cells: Lines, method: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    chosen = {"data": "objects", "shots": 16, "method": method}
    plain = {cell["seed"]: cell for cell in select(cells, **chosen, variant="")}
    return [
        (plain[cell["seed"]], cell)
        for cell in select(cells, **chosen, variant=VARIANT)
        if cell["seed"] in plain
    ]


def _change(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    value: Callable[[Mapping[str, Any]], float],
) -> str:
    before, after = (100 * fmean(value(pair[place]) for pair in pairs) for place in (0, 1))
    return f"{before:.1f} → {after:.1f}"


def distilled(plan: Plan, cells: Lines) -> Table:
    """Return the students of a larger teacher."""
    rows = []
    for row in plan.rows:
        row_cells = select(cells, row=row)
        if not row_cells:
            continue
        mark = " †" if any(cell["transductive"] for cell in row_cells) else ""
        scopes = ("base", "new", "harmonic", "all")
        figures = [percent_of(row_cells, lambda cell, s=scope: cell[s]) for scope in scopes]  # type: ignore[misc]
        rows.append((f"{row}{mark}", *figures))
    header = ("", "tuned", "new", "harmonic", "all")
    note = "† transductive: the test photos were among its photos without labels."
    return Table("A student and its teacher on objects, 16 shots, %", header, tuple(rows), note)


if __name__ == "__main__":
    main()
