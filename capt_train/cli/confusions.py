"""`capt-confusions`: which classes a run confuses; needs neither torch nor the images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say, table
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_train.confusion.confusions import ConfusionCell, Confusions


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=PathInHome())
@click.option(
    "--top",
    default=20,
    show_default=True,
    type=click.IntRange(0),
    help="Pairs in the table; files hold all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all as JSON on stdout, with images.")
@click.option("--csv", "csv_file", type=PathInHome(), help="Write a new CSV file; - for stdout.")
@click.option("--png", "png_file", type=PathInHome(), help="Draw the matrices into a new file.")
@click.version_option(__version__, prog_name="capt")
def main(run: Path, top: int, as_json: bool, csv_file: Path | None, png_file: Path | None) -> None:
    """Show which training images of RUN are mistaken for which class, before and after tuning.

    \b
    Example:
      capt-confusions runs/mine --top 5
      capt-confusions runs/mine --csv pairs.csv --png pairs.png
      capt-confusions runs/mine --json
    """
    csv_on_stdout = csv_file == Path("-")
    if as_json and csv_on_stdout:
        raise click.UsageError("--json and --csv - both write to stdout; choose one of them")
    for file in (csv_file, png_file):
        _refuse_existing(file)
    confusions = _read(run)
    if csv_file is not None and not csv_on_stdout:
        from capt_deploy.core.files import write_bytes

        write_bytes(csv_file, _csv(confusions).encode())
        say(f"wrote {csv_file}")
    if png_file is not None:
        from capt_train.confusion.plot import MOST_DRAWN, plot_confusions

        drawn, classes = confusions.among_worst(MOST_DRAWN), len(confusions.class_names)
        plot_confusions(png_file, drawn.matrices(), drawn.class_names, classes)
        say(f"wrote {png_file}")
    if as_json:
        print_json(confusions.to_dict())
    elif csv_on_stdout:
        click.echo(_csv(confusions), nl=False)
    else:
        click.echo(_table(confusions, top))


def _refuse_existing(file: Path | None) -> None:
    from capt_deploy.core.errors import ConfigError

    if file is not None and file != Path("-") and file.exists():
        raise ConfigError(f"{file}: already there, and nothing is overwritten; choose another name")


def _read(run: Path) -> "Confusions":
    from capt_deploy.core.errors import RunError
    from capt_train.confusion.confusions import CONFUSIONS, read_confusions

    if not (run / CONFUSIONS).is_file():
        raise RunError(
            f"{run}: no {CONFUSIONS} in it; expected the folder of a finished run of capt-train"
        )
    return read_confusions(run / CONFUSIONS)


def _table(confusions: "Confusions", top: int) -> str:
    """Return a table of the worst pairs, with the sum of all pairs in its last line."""
    shown, rest = confusions.pairs[:top], confusions.pairs[top:]
    rows = [_row(f"{pair.true} taken for {pair.predicted}", [pair]) for pair in shown]
    if rest:
        rows.append(_row(f"({len(rest)} more)", rest))
    images = f"all, of {sum(confusions.shots)} images of {len(confusions.class_names)} classes"
    rows.append(_row(images, confusions.pairs))
    return table(["confused pair (held-out images)", "before", "after"], rows)


def _row(name: str, pairs: Sequence["ConfusionCell"]) -> list[str]:
    sums = sum(pair.before for pair in pairs), sum(pair.after for pair in pairs)
    return [name, *(f"{round(count, 1):.10g}" for count in sums)]


def _csv(confusions: "Confusions") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", "predicted", "before", "after"])
    writer.writerows(
        [pair.true, pair.predicted, f"{pair.before:.10g}", f"{pair.after:.10g}"]
        for pair in confusions.pairs
    )
    return text.getvalue()
