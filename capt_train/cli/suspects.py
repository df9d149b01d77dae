"""`capt-suspects`: photos of a run to look at again; needs neither torch nor the images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capt_deploy.core.console import Command, PathInHome, counted, print_json, say, table
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_train.data.copies import Copy
    from capt_train.data.suspects import SuspectLabel, Suspects


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=PathInHome())
@click.option(
    "--top",
    default=20,
    show_default=True,
    type=click.IntRange(0),
    help="Labels in the table, at least the probably wrong ones; files hold all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all as JSON on stdout.")
@click.option(
    "--csv", "csv_file", type=PathInHome(), help="Write the labels to a new CSV file; - for stdout."
)
@click.version_option(__version__, prog_name="capt")
def main(run: Path, top: int, as_json: bool, csv_file: Path | None) -> None:
    """List photos of RUN whose labels are probably wrong, and copies of one photo.

    Each photo was judged by a model that was tuned without it; the most suspect come first. A copy
    with two labels teaches a contradiction; a copy in two splits makes figures and confidences look
    better than they are. Nothing is moved or deleted.

    \b
    Example:
      capt-suspects runs/mine
      capt-suspects runs/mine --csv suspects.csv
      capt-suspects runs/mine --json
    """
    csv_on_stdout = csv_file == Path("-")
    if as_json and csv_on_stdout:
        raise click.UsageError("--json and --csv - both write to stdout; choose one of them")
    from capt_deploy.core.errors import ConfigError, RunError
    from capt_train.data.suspects import SUSPECTS, Suspects

    if csv_file is not None and not csv_on_stdout and csv_file.exists():
        raise ConfigError(
            f"{csv_file}: already there, and nothing is overwritten; choose another name"
        )
    if not (run / SUSPECTS).is_file():
        raise RunError(
            f"{run}: no {SUSPECTS} in it; expected the folder of a finished run of this version"
        )
    suspects = Suspects.load(run / SUSPECTS)
    if csv_file is not None and not csv_on_stdout:
        from capt_deploy.core.files import write_bytes

        write_bytes(csv_file, _csv(suspects.labels).encode(errors="surrogateescape"))
        say(f"wrote {csv_file}")
    if as_json:
        print_json(suspects.to_dict())
    elif csv_on_stdout:
        click.echo(_csv(suspects.labels), nl=False)
    else:
        click.echo(_text(suspects, top))


def _text(suspects: "Suspects", top: int) -> str:
    """Return both tables, each with a sentence that says what to do."""
    parts = []
    if suspects.labels:
        wrong = len(suspects.probably_wrong)
        shown = suspects.labels[: max(top, wrong)]
        judged = counted(len(suspects.labels), "photo")
        parts.append(
            f"About {suspects.wrong_share:.0%} of the labels of {judged} seem to be wrong; "
            f"look at the first {wrong}."
            if suspects.wrong_share
            else f"{judged} cannot tell how many labels are wrong; the least probable ones are:"
        )
        rows = [
            (
                *(photo.path, photo.label, f"{100 * photo.p_label:.1f}"),
                *(photo.likely, f"{100 * photo.p_likely:.1f}"),
            )
            for photo in shown
        ]
        if rows:
            parts.append(
                table(["photo", "label", "probability, %", "more probable", "probability, %"], rows)
            )
    else:
        parts.append("No photo was held out of tuning, so no label could be judged.")
    parts.append(_copies(suspects.copies))
    return "\n\n".join(parts)


def _copies(copies: Sequence["Copy"]) -> str:
    if not copies:
        return "No copies of a photo were found."
    rows = [
        (
            *(copy.first, copy.second),
            *(" / ".join(dict.fromkeys(values)) for values in (copy.labels, copy.splits)),
            copy.problem or "counts twice",
        )
        for copy in copies
    ]
    found = table(["photo", "its copy", "label", "split", "problem"], rows)
    return f"Copies of one photo: keep one of each, in one split and with one label.\n\n{found}"


def _csv(labels: Sequence["SuspectLabel"]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ("path", "split", "label", "p_label", "likely", "p_likely", "p_wrong")
    writer.writerow(header)
    for photo in labels:
        values = [getattr(photo, name) for name in header]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()
