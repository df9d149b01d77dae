"""`capt-export`."""

from pathlib import Path

import click

from capt_deploy.console import Command, PathInHome, print_json, say
from capt_deploy.version import __version__


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=PathInHome())
@click.option("--out", required=True, type=PathInHome(), help="Bundle to write.")
@click.option("--gate-data", type=PathInHome(), help="The run's data set, if it has moved.")
@click.option("--json", "as_json", is_flag=True, help="Print the bundle's report on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(run: Path, out: Path, gate_data: Path | None, as_json: bool) -> None:
    """Fold a finished RUN into one text-embedding matrix and one ONNX graph.

    The graph is compared with the trained model on the run's own validation images. If they
    differ, nothing is written and the exit code is 1.

    \b
    Example:
      capt-export runs/mine --out mine.capt
    """
    from capt_deploy.bundle import REPORT
    from capt_deploy.errors import BundleError
    from capt_deploy.files import read_json
    from export.writer import export_run

    export_run(run, out, gate_data)
    if as_json:
        print_json(read_json(out / REPORT, BundleError))
    say(f"bundle written to {out}")
