"""`capt-eval`: the same report for a run (in torch) and for a bundle (no torch needed)."""

from pathlib import Path

import click

from capt_deploy.console import Command, PathInHome, print_json, say
from capt_deploy.evaluation import SCOPES
from capt_deploy.version import __version__


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_or_bundle", type=PathInHome())
@click.option("--data", required=True, type=PathInHome(), help="As of capt-train.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option(
    "--classes", type=click.Choice(SCOPES), help="Measure only these; by default all that exist."
)
@click.option("--class-names", type=PathInHome(), help="As of capt-train.")
@click.option("--backend", default="auto", show_default=True, help="Of a bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(
    run_or_bundle: Path,
    data: Path,
    split: str,
    classes: str | None,
    class_names: Path | None,
    backend: str,
    as_json: bool,
) -> None:
    """Measure accuracy, calibration and confusion of RUN_OR_BUNDLE on labelled images.

    \b
    Example:
      capt-eval runs/mine --data photos
      capt-eval mine.capt --data photos --split val --json
    """
    from capt_deploy.bundle import is_bundle
    from capt_deploy.errors import RunError
    from capt_deploy.summary import confused_pairs_table, summary

    if not run_or_bundle.exists():
        raise RunError(f"{run_or_bundle}: no such run or bundle")
    if is_bundle(run_or_bundle):
        from capt_deploy.scoring import evaluate_bundle

        report = evaluate_bundle(run_or_bundle, data, split, classes, class_names, backend)
    else:
        from capt_train.evaluate import evaluate_run

        report = evaluate_run(run_or_bundle, data, split, classes, class_names)
    if as_json:
        print_json(report)
    say(f"\n{summary(report)}\n\n{confused_pairs_table(report)}")
