"""`capt-eval`: the same report for a run (in torch) and for a bundle (no torch needed)."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.version import __version__
from capt_deploy.evaluation.evaluate import SCOPES

if TYPE_CHECKING:
    from capt_deploy.evaluation.evaluate import Report

_Asked = tuple[Path, str, Path | None]  # data set, split, class names


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_or_bundle", type=PathInHome())
@click.option("--data", required=True, type=PathInHome(), help="As of capt-train.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option(
    "--classes", type=click.Choice(SCOPES), help="Measure only these; by default all that exist."
)
@click.option("--class-names", type=PathInHome(), help="As of capt-train.")
@click.option("--backend", default="auto", show_default=True, help="Of a bundle.")
@click.option("--report", "folder", type=PathInHome(), help="Write a page about it, with pictures.")
@click.option("--exported", type=PathInHome(), help="The run's bundle, to be on that page as well.")
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
    """Measure accuracy, calibration and confusion of RUN_OR_BUNDLE on labelled images.

    \b
    Example:
      capt-eval runs/mine --data photos
      capt-eval mine.capt --data photos --split val --json
      capt-eval runs/mine --data photos --exported mine.capt --report page
    """
    from capt_deploy.bundle.read import is_bundle
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
            from capt_deploy.bundle.read import open_bundle

            open_bundle(exported)
    asked = (data, split, class_names)
    if is_bundle(run_or_bundle):
        report = _bundle(run_or_bundle, asked, classes, backend, folder)
    else:
        report = _run(run_or_bundle, asked, classes, backend, folder, exported)
    if as_json:
        print_json(report)
    say(f"\n{summary(report)}\n\n{confused_pairs_table(report)}")


def _bundle(
    bundle: Path, asked: _Asked, scope: str | None, backend: str, folder: Path | None
) -> "Report":
    if folder is None:
        from capt_deploy.evaluation.scoring import score_bundle

        return score_bundle(bundle, *asked, backend).report(scope)
    from export.report import ask_all, of_bundle, split_notes, write

    scored, notes = ask_all(bundle, *asked, backend)
    report = scored[0].report(scope)
    notes = (*notes, *split_notes(asked[1]))
    write(of_bundle(scored, notes, _title(bundle, asked)), folder)
    return report


def _run(
    run: Path,
    asked: _Asked,
    scope: str | None,
    backend: str,
    folder: Path | None,
    exported: Path | None,
) -> "Report":
    from capt_train.run.evaluate import score_run

    scored = score_run(run, *asked)
    report = scored.report(scope)
    if folder is None:
        return report
    from export.report import ask_all, joined, of_bundle, of_run, split_notes, write

    title = _title(run, asked)
    page = of_run(scored, run.name, title, split_notes(asked[1]))
    if exported is not None:
        page = joined(page, of_bundle(*ask_all(exported, *asked, backend), title))
    write(page, folder)
    return report


def _title(path: Path, asked: _Asked) -> str:
    data, split, _ = asked
    return f"{path.stem}: {split} images of {data.resolve().name}"
