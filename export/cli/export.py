"""`capt-export`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.version import __version__


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", type=PathInHome(), nargs=-1, metavar="RUN...")
@click.option("--out", type=PathInHome(), help="Bundle to write.")
@click.option("--fp32", is_flag=True, help="A float32 graph; the default.")
@click.option("--fp16", is_flag=True, help="A float16 graph; norms and head stay float32.")
@click.option("--bf16", is_flag=True, help="The same in bfloat16, for Ampere and later.")
@click.option("--int8", is_flag=True, help="Products in int8 where the logits bear it.")
@click.option("--classes", type=PathInHome(), help="Names, one a line: a row for each of these.")
@click.option("--open-vocab", "open_vocabulary", is_flag=True, help="Add the text side; see below.")
@click.option("--dac", "distance_aware", is_flag=True, help="Calibrate new classes by distance.")
@click.option("--triton", type=PathInHome(), help="Write a model repository for Triton as well.")
@click.option("--opset", default=20, show_default=True, help="23 has an Attention operator.")
@click.option("--gate-data", type=PathInHome(), help="Check on these images; see below.")
@click.option("--gate-images", default=256, show_default=True, help="Check on so many at most.")
@click.option("--force", is_flag=True, help="Write the bundle, marked, though the check fails.")
@click.option("--check", type=PathInHome(), metavar="BUNDLE", help="Only check a written bundle.")
@click.option("--backend", default="auto", show_default=True, help="Of --check.")
@click.option("--json", "as_json", is_flag=True, help="Print the report on stdout.")
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
    """Fold a finished RUN into one text-embedding matrix and one ONNX graph.

    Several runs over one model, tuned with --without visual,colours, become one bundle, in which
    each run's prompt rules its own classes.

    Each graph is compared with the trained model on the run's own validation images, or on
    those of --gate-data: the same data set where it has moved, another labelled one, or a folder of
    images. If they differ, nothing is written and the exit code is 1. Of several precisions each
    gets a graph in the same bundle, and the runtime picks.

    --classes may also name classes that the run does not know: they get the learned prompts. With
    --open-vocab, classes can be added to the bundle where it is used, without torch. With --dac,
    images that are taken for a class outside training get another confidence: less, the further
    tuning has moved that class from those tuned on. docs/export.md says what this gains.

    --check asks the graphs of a bundle again, on this machine; --gate-data is then where the
    images lie, which may be left out. It needs no torch.

    \b
    Example:
      capt-export runs/mine --out mine.capt --fp16
      capt-export --check mine.capt --gate-data photos
    """
    if check is not None:
        from capt_deploy.verify.check import check_bundle

        _refuse_others()
        report = check_bundle(check, gate_data, backend)
    else:
        if not runs or out is None:
            raise click.UsageError("expected RUN and --out, or --check BUNDLE")
        report = _export(runs, out, gate_data, options)
    if as_json:
        print_json(report)


def _refuse_others() -> None:
    """Refuse what --check would ignore."""
    context = click.get_current_context()
    own = ("check", "gate_data", "backend", "as_json")
    given = [
        parameter.get_error_hint(context)
        for parameter in context.command.params
        if parameter.name not in own
        and context.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--check writes nothing and takes no {', '.join(given)}")


def _export(
    runs: tuple[Path, ...], out: Path, gate_data: Path | None, options: dict[str, Any]
) -> Any:
    from capt_deploy.bundle.read import REPORT, open_bundle
    from capt_deploy.core.errors import BundleError, ConfigError
    from capt_deploy.core.files import read_json, refuse_existing
    from export.graph.lower import PRECISIONS
    from export.source.classes import read_class_list
    from export.triton.repository import write_triton
    from export.writer import ExportOptions, export_run

    wanted = tuple(name for name in PRECISIONS if options.pop(name, False))
    classes, triton = options.pop("classes"), options.pop("triton")
    names = None if classes is None else read_class_list(classes)
    own = ExportOptions(**options)
    if triton is not None:
        refuse_existing(triton, BundleError)
        here, there = out.absolute(), triton.absolute()
        if here == there or here in there.parents or there in here.parents:
            raise ConfigError(f"--triton {triton} and --out {out}: expected two separate folders")
    export_run(runs, out, gate_data, replace(own, precisions=wanted or own.precisions), names)
    say(f"bundle written to {out}")
    if triton is not None:
        write_triton(open_bundle(out), triton)
        say(f"model repository for Triton written to {triton}")
    return read_json(out / REPORT, BundleError)
