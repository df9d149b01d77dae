"""The command `capt-predict`."""

import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capt_deploy.backends.spec import backend_names
from capt_deploy.core.console import Command, PathInHome, counted, print_json, progress, say
from capt_deploy.core.install import require_packages
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.serving.labelling import LabelledFile


def _check_address(
    context: click.Context, parameter: click.Parameter, address: str | None
) -> str | None:
    """Refuse a path that stands behind `--ray`, as if it were an address."""
    if address is None or address in ("local", "auto") or ":" in address:
        return address
    raise click.BadParameter(
        f"expected local, auto or HOST:PORT, came {address!r}; write paths before --ray"
    )


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome())
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--backend", default="auto", show_default=True, help=f"One of {', '.join(backend_names())}."
)
@click.option(
    "--top-k", default=5, show_default=True, type=click.IntRange(1), help="Classes shown."
)
@click.option("--coverage", type=float, help="Show sets that hold the true class so often, 0-1.")
@click.option("--accuracy", type=float, help="Reject what is too unsure for this accuracy, 0-1.")
@click.option(
    "--reject-unfamiliar",
    metavar="SHARE",
    type=float,
    help="Reject what looks less familiar than all but this share of known images, such as 0.05.",
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--fast-decode",
    is_flag=True,
    help="Let the decoder shrink large JPEGs; changes their pixels a little.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list; with --ray, the counts.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
@click.option(
    "--ray",
    "address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    callback=_check_address,
    help="Label in parts with Ray: on this machine, or on the cluster at auto or HOST:PORT.",
)
@click.option(
    "--out", metavar="FOLDER", help="Where --ray writes Parquet; a killed job is continued there."
)
@click.version_option(__version__, prog_name="capt")
def main(
    bundle: Path,
    paths: tuple[str, ...],
    backend: str,
    top_k: int,
    coverage: float | None,
    accuracy: float | None,
    reject_unfamiliar: float | None,
    batch_size: int,
    fast_decode: bool,
    as_json: bool,
    as_csv: bool,
    address: str | None,
    out: str | None,
) -> None:
    """Label images with a BUNDLE. PATHS are images, folders, patterns, or - for a list on stdin;
    with --ray also Parquet files with a column "bytes" or "path", and URIs such as s3://bucket/x.

    An image that cannot be read gets a row with its error; the exit code is then 1. An image of no
    known class can get a confident label: the text form marks images that look "unfamiliar".

    \b
    Example:
      capt-predict pets.capt photos/ extra.jpg --top-k 3
      capt-predict pets.capt photos/ --accuracy 0.95 --csv
      find . -name '*.jpg' | capt-predict pets.capt - --json
      capt-predict pets.capt photos/ --ray --out results/
    """
    if as_json and as_csv:
        raise click.UsageError("choose --json or --csv, not both")
    if (address is None) != (out is None):
        raise click.UsageError("--ray and --out FOLDER need each other")
    if address is not None and as_csv:
        raise click.UsageError("--ray writes Parquet; leave out --csv")
    from capt_deploy.confidence.decisions import DecisionOptions
    from capt_deploy.serving.classifier import Classifier
    from capt_deploy.serving.labelling import find_images, label_files, read_names

    listed = read_names(sys.stdin.buffer.read()) if "-" in paths else []
    decisions = DecisionOptions.from_given(
        coverage=coverage, accuracy=accuracy, familiarity=reject_unfamiliar
    )
    given = [path for path in paths if path != "-"]
    if address is not None and out is not None:
        require_packages("--ray", "ray", "ray", "pyarrow")
        from capt_deploy.bulk.job import label_on_ray
        from capt_deploy.bulk.labeller import LabelOptions
        from capt_deploy.bulk.parts import find_parts

        options = LabelOptions(backend, top_k, decisions, fast_decode, batch_size)
        summary = label_on_ray(bundle, find_parts(given, listed), out, options, address)
        say(f"{counted(summary.images, 'image')} in {out}, {counted(summary.errors, 'error')}")
        if as_json:
            print_json({"out": out, **summary._asdict()})
        sys.exit(1 if summary.errors else 0)
    files = find_images(given, listed)
    with (
        Classifier.load(
            bundle, backend, fast_decode=fast_decode, decisions=decisions
        ) as classifier,
        # On Ctrl-C the batch that is being decoded is dropped
        closing(
            label_files(classifier, files, top_k, batch_size, show_sets=coverage is not None)
        ) as results,
    ):
        say(f"{counted(len(files), 'image')}, {classifier.running_on}")
        failed = _print_json(results, len(files)) if as_json else _print_lines(results, as_csv)
    if failed:
        sys.exit(1)


def _print_json(results: "Iterable[LabelledFile]", total: int) -> bool:
    """Print all rows at the end; return whether one is an error."""
    rows = []
    with progress("predicting", total, "images") as counter:
        for row in results:
            rows.append(row)
            counter.advance()
    print_json([row.to_dict() for row in rows])
    return any(row.error for row in rows)


def _print_lines(rows: "Iterable[LabelledFile]", as_csv: bool) -> bool:
    """Print each row once its batch is done; return whether one is an error."""
    import csv

    from capt_deploy.serving.labelling import CSV_HEADER

    failed = False
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        writer.writerow(CSV_HEADER)
    for row in rows:
        failed |= row.error is not None
        if as_csv:
            writer.writerow(row.fields())
        else:
            click.echo(row)
    return failed
