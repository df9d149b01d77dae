"""The command `capt-export`."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from capt_deploy.core.console import (
    PathInHome,
    SectionedCommand,
    print_json,
    say,
    section_option,
)
from capt_deploy.core.version import __version__

_CHECK_OPTIONS = ("check", "gate_data", "backend", "as_json")

_bundle = partial(section_option, "Bundle")
_precision = partial(section_option, "Precision")
_gate = partial(section_option, "Check")


@click.command(cls=SectionedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", type=PathInHome(), nargs=-1, metavar="RUN...")
@_bundle("--out", type=PathInHome(), help="Bundle to write; a zip if its name ends in .zip.")
@_bundle("--classes", type=PathInHome(), help="File of class names, one a line.")
@_bundle("--open-vocab", "open_vocabulary", is_flag=True, help="Let classes be added later.")
@_bundle("--dac", "distance_aware", is_flag=True, help="Calibrate new classes by distance.")
@_bundle("--triton", type=PathInHome(), help="Write a model repository for Triton as well.")
@_precision("--fp32", is_flag=True, help="float32; the default.")
@_precision("--fp16", is_flag=True, help="float16, with norms and head in float32.")
@_precision("--bf16", is_flag=True, help="bfloat16, for Ampere GPUs and later.")
@_precision("--int8", is_flag=True, help="int8 layers as far as the logits allow, else float16.")
@_precision("--opset", default=20, show_default=True, help="23 has an Attention operator.")
@_gate("--gate-data", type=PathInHome(), help="Images to check on instead of the run's.")
@_gate("--gate-images", default=256, show_default=True, help="Most images to check on.")
@_gate("--force", is_flag=True, help="Write graphs that fail too, and mark the bundle.")
@_gate("--check", type=PathInHome(), metavar="BUNDLE", help="Only check a written bundle.")
@_gate("--backend", default="auto", show_default=True, help="Backend of --check.")
@section_option("Output", "--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.version_option(__version__, prog_name="capt")
def main(
    runs: tuple[Path, ...],
    out: Path | None,
    check: Path | None,
    gate_data: Path | None,
    backend: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Fold a finished RUN into one text-embedding matrix and one ONNX graph per precision.

    Several runs over one model, tuned with --without visual,colours, become one bundle, with each
    run's prompts for its classes. The runtime chooses among the precisions of a bundle.

    Every graph is compared with the trained model on the run's validation images, or on those of
    --gate-data: the same data set where it has moved, another labelled one, or a folder of images.
    Graphs that differ too much are left out, and the exit code is 1; if all differ, nothing is
    written.

    New names in --classes get the learned prompts. With --dac, predictions of a class outside
    training get the less confidence, the further tuning has moved that class from the tuned ones;
    docs/export.md shows the gain.

    --check compares the graphs of a bundle again, on this machine and without torch. --gate-data
    is then the folder of the images; without it, drawn patterns are used.

    \b
    Example:
      capt-export runs/mine --out mine.capt --fp16
      capt-export --check mine.capt --gate-data photos
    """
    if check is not None:
        from capt_deploy.verify.check import check_bundle

        _refuse_export_options()
        report = check_bundle(check, gate_data, backend)
    else:
        if not runs or out is None:
            raise click.UsageError("expected RUN and --out, or --check BUNDLE")
        report = _export(runs, out, gate_data, as_json, options)
    if as_json:
        print_json(report)


def _refuse_export_options() -> None:
    """Refuse options that --check would ignore."""
    context = click.get_current_context()
    ignored = [
        parameter.get_error_hint(context)
        for parameter in context.command.params
        if parameter.name not in _CHECK_OPTIONS
        and context.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
    ]
    if ignored:
        raise click.UsageError(f"--check writes nothing and takes no {', '.join(ignored)}")


def _export(
    runs: tuple[Path, ...],
    out: Path,
    gate_data: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> Any:
    from capt_deploy.bundle.read import REPORT, open_bundle
    from capt_deploy.core.errors import BundleError, ConfigError, GateError
    from capt_deploy.core.files import parse_json, refuse_existing
    from export.graph.lower import FP32, PRECISIONS
    from export.source.classes import read_class_list
    from export.triton.repository import write_triton
    from export.writer import ExportOptions, export_run

    precisions = tuple(name for name in PRECISIONS if options.pop(name, False)) or (FP32,)
    classes, triton = options.pop("classes"), options.pop("triton")
    names = None if classes is None else read_class_list(classes)
    if triton is not None:
        refuse_existing(triton, BundleError)
        bundle, repository = out.absolute(), triton.absolute()
        if bundle == repository or bundle in repository.parents or repository in bundle.parents:
            raise ConfigError(f"--triton {triton} and --out {out}: expected two separate folders")
    failure = None
    try:
        export_run(runs, out, gate_data, ExportOptions(precisions, **options), names)
        say(f"bundle written to {out}")
    except GateError as error:
        if not out.exists():
            raise
        failure = error  # some graphs have passed and are written
    if triton is not None:
        write_triton(open_bundle(out), triton)
        say(f"model repository for Triton written to {triton}")
    report = parse_json(open_bundle(out).read(REPORT), f"{out}, {REPORT}", BundleError)
    if failure is not None:
        if as_json:
            print_json(report)
        raise failure
    return report
