"""`capt-eval`: the same report for a run (in torch) and for a bundle (no torch needed)."""

from pathlib import Path

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.version import __version__
from capt_deploy.evaluation.evaluate import SCOPES


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_or_bundle", type=PathInHome())
@click.option("--data", required=True, type=PathInHome(), help="Labelled images, as capt-train's.")
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True
)
@click.option(
    "--classes", type=click.Choice(SCOPES), help="Measure only these; by default all that exist."
)
@click.option("--class-names", type=PathInHome(), help="A file of class names, as capt-train's.")
@click.option("--backend", default="auto", show_default=True, help="What runs a bundle.")
@click.option(
    "--report", "folder", type=PathInHome(), help="Write a page with plots and photos to a folder."
)
@click.option(
    "--exported", type=PathInHome(), help="With --report: the run's bundle, to compare with it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(
    run_or_bundle: Path,
    data: Path,
    split: str,
    classes: str | None,
    class_names: Path | None,
    backend: str,
    folder: Path | None,
    exported: Path | None,
    as_json: bool,
) -> None:
    """Measure accuracy, calibration and confusions of RUN_OR_BUNDLE on labelled images.

    \b
    Example:
      capt-eval runs/mine --data photos
      capt-eval mine.capt --data photos --split val --json
      capt-eval runs/mine --data photos --exported mine.capt --report page
    """
    from capt_deploy.bundle.read import is_bundle, open_bundle
    from capt_deploy.core.errors import RunError
    from capt_deploy.evaluation.summary import confused_pairs_table, summary

    if not run_or_bundle.exists():
        raise RunError(f"{run_or_bundle}: no such run or bundle")
    if exported is not None and (folder is None or is_bundle(run_or_bundle)):
        raise click.UsageError("--exported goes with --report, and with a run")
    if folder is not None:
        from capt_deploy.report import check_folder

        check_folder(folder)  # before time is spent
        if classes is not None:
            raise click.UsageError("--report shows all classes; leave --classes out")
        if exported is not None:
            open_bundle(exported)
    from export.report import score

    evaluation = score(
        *(run_or_bundle, data, split, class_names, backend),
        exported=exported,
        all_graphs=folder is not None,
    )
    report = evaluation.report(classes)
    if folder is not None:
        from capt_deploy.report import write_report

        title = f"{run_or_bundle.stem} on the {split} images of {data.resolve().name}"
        say(f"report written to {write_report(evaluation, title, folder)}")
    if as_json:
        print_json(report)
    say(f"\n{summary(report)}\n\n{confused_pairs_table(report)}")
