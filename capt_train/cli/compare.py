"""`capt-compare`."""

import sys
from pathlib import Path

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.version import __version__


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=PathInHome())
@click.option(
    "--out", type=PathInHome(), help="Folder of the results [default: CONFIG without .json]."
)
@click.option("--only-table", is_flag=True, help="Measure nothing; write the tables again.")
@click.option("--figures", is_flag=True, help="Draw accuracy over shots, and ECE.")
@click.option("--json", "as_json", is_flag=True, help="Print all cells as JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(config: Path, out: Path | None, only_table: bool, figures: bool, as_json: bool) -> None:
    """Measure methods × data sets × shots × seeds on the same splits, as CONFIG says.

    Results lie in a folder: cells.jsonl with a line for each run, and table.md, table.html and
    table.tex. What is measured is not measured again. docs/methods.md explains CONFIG.

    \b
    Example:
      capt-compare papers.json
      capt-compare papers.json --only-table --figures
    """
    from capt_deploy.core.files import write_bytes
    from capt_train.compare.plan import read_plan
    from capt_train.compare.run import read_cells, run_cells
    from capt_train.compare.tables import tables, to_html, to_latex, to_markdown

    plan = read_plan(config)
    folder = out or config.with_suffix("")
    for notice in plan.skipped:
        say(f"note: {notice}")
    failed = {} if only_table else run_cells(folder, plan)
    cells = read_cells(folder, plan)
    found = tables(plan, cells)
    images = []
    if cells:
        if figures:
            from capt_train.compare.figures import draw

            images = draw(folder, plan, cells)
        for name, text in (
            ("table.md", to_markdown(found) + "\n"),
            ("table.html", to_html(found, images)),
            ("table.tex", to_latex(found)),
        ):
            write_bytes(folder / name, text.encode())
    if as_json:
        print_json({"cells": list(cells.values()), "failed": failed})
    else:
        click.echo(to_markdown(found))
    missing = len(plan.cells) - len(cells)
    if missing:
        say(f"note: {missing} of {len(plan.cells)} cells are missing")
    if failed:
        say(f"{len(failed)} cells failed; the next start tries them again")
        sys.exit(2)
    say(f"tables written to {folder}")
