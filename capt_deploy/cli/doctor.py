"""The command `capt-doctor`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from capt_deploy.core.console import Command, PathInHome, counted, print_json, say
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.core.gpus import Gpu
    from capt_deploy.doctor.diagnose import Diagnosis


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False, type=PathInHome())
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(bundle: Path | None, as_json: bool) -> None:
    """Report versions and GPUs, which backends work, and how to fix the others.

    Each backend runs a tiny graph, or a BUNDLE, in a separate process. The exit code is 0 if at
    least one works.

    \b
    Example:
      capt-doctor
      capt-doctor pets.capt --json
    """
    from capt_deploy.doctor.diagnose import diagnose

    say("trying every backend")
    diagnosis = diagnose(bundle)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        click.echo(_text(diagnosis))
    if diagnosis.chosen is None:
        sys.exit(1)


def _text(diagnosis: "Diagnosis") -> str:
    from capt_deploy.core.jetson import jetpack

    machine, driver = diagnosis.machine, diagnosis.driver
    memory, cores = machine["memory_bytes"], counted(machine["cores"], "core")
    lines = [
        f"system     {machine['system']}",
        f"processor  {machine['cpu']}, {cores} of {machine['cores_of_machine']}",
        f"memory     {'unknown' if memory is None else f'{memory / 1e9:.1f} GB'}",
    ]
    if machine["jetson_linux"]:
        names = (f"Jetson Linux {machine['jetson_linux']}", jetpack())
        lines.append(f"Jetson     {', '.join(filter(None, names))}")
    lines += [f"GPU {number}      {_gpu(gpu)}" for number, gpu in enumerate(driver.gpus)]
    if driver.cuda:
        lines.append(f"driver     runs CUDA up to {driver.cuda}")
    if driver.problem:
        lines.append(f"driver     {driver.problem}")
    versions = [f"{name} {version}" for name, version in diagnosis.versions.items()]
    lines += [f"versions   {', '.join(versions)}", ""]
    for finding in diagnosis.backends:
        if finding.usable:
            lines.append(f"{finding.name:<17} works on {finding.device} ({finding.seconds:.1f} s)")
        else:
            lines += [f"{finding.name:<17} no: {finding.reason}", f"{'':<17} fix: {finding.fix}"]
    lines += [f"problem: {problem}" for problem in diagnosis.problems]
    chosen = diagnosis.chosen or "none"
    if diagnosis.measured:
        chosen = f"the fastest of {', '.join(diagnosis.measured)}, which it measures once a bundle"
    return "\n".join([*lines, f"auto takes {chosen}"])


def _gpu(gpu: "Gpu") -> str:
    memory = "" if gpu.memory_bytes is None else f"{gpu.memory_bytes / 1e9:.1f} GB"
    sm = "" if gpu.sm is None else f"SM {gpu.sm}"
    driver = "" if gpu.driver is None else f"driver {gpu.driver}"
    return ", ".join(filter(None, (gpu.name, sm, memory, driver)))
