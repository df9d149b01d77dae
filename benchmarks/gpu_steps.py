"""The steps of benchmarks/gpu.sh: which commands, and how long each may take."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.exported import bundle_of
from capt_deploy.backends.spec import BackendSpec

_SECONDS_TO_BUILD, _SECONDS_TO_BUILD_PORTABLE = 55.0, 25.0  # one engine
_MODEL, _PRECISIONS = "ViT-B/16", ("fp16",)
_TORCH = ("torch", "open_clip")
_SCOPES = "device,host,image_to_label"


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    words: tuple[str, ...]
    seconds: float  # at most
    needs: str = ""  # the step that must have succeeded before
    as_json: bool = True  # whether it prints JSON on stdout
    modules: tuple[str, ...] = ()  # that must be installed
    junit: Path | None = None  # pytest's report of passed tests


def steps(work: Path, *, photos: bool, engines: Sequence[BackendSpec]) -> list[Step]:
    """Return the steps, the most important first; limits add up to less than all seconds.

    Args:
        work: folder for bundles.
        photos: whether the photos of the ablation exist.
        engines: the backends whose engines are built.
    """
    bundle, junit = bundle_of(_MODEL, work, _PRECISIONS), work / "tests.xml"
    words = (*("-m", "pytest", "tests/gpu", "-m", "gpu"), "-p", "no:cacheprovider")
    of_model = ("--models", _MODEL, "--precisions", ",".join(_PRECISIONS), "--work", str(work))
    in_short = ("--device", "cuda", "--epochs", "10", "--no-plain", "--json")
    quick = ("--scopes", "device,image_to_label", "--seconds", "0.5", "--json")
    beside = ("latency", "--device", "cuda", *of_model, *quick)
    worlds = ("pictograms", "cifar100") if photos else ("pictograms",)
    return [
        Step("doctor", _command("capt_deploy.cli.doctor", "--json"), 25),
        Step(
            "tests",
            (sys.executable, *words, f"--junitxml={junit}"),
            60,
            as_json=False,
            modules=("pytest",),
            junit=junit,
        ),
        Step(
            "export",
            _module("exported", str(work), "--model", _MODEL, "--precisions", of_model[3]),
            75,
            as_json=False,
            modules=_TORCH,
        ),
        # Building is not measured. --only bench selects these steps too, by their names.
        *(
            Step(
                f"bench engine {spec.name}",
                _command("capt_deploy.cli.build", str(bundle), "--backend", spec.name, "--json"),
                _SECONDS_TO_BUILD_PORTABLE if spec.portable_engines else _SECONDS_TO_BUILD,
                "export",
            )
            for spec in engines
        ),
        Step(
            "bench",
            _command(
                "capt_deploy.cli.bench",
                *(str(bundle), "--backend", "gpu", "--json"),
                *("--scope", _SCOPES, "--batch", "1,8,32", "--seconds", "1"),
            ),
            45,
            "export",
        ),
        Step(
            "open_clip",
            _module(*beside, "--batch", "1,32", "--no-compile"),
            45,
            "export",
            modules=_TORCH,
        ),
        *(
            Step(
                f"train {world}",
                _module("training_speed", "--world", world, *in_short),
                42,
                modules=_TORCH,
            )
            for world in worlds
        ),
        # Last, for torch.compile may take a minute for each batch.
        Step(
            "open_clip compiled",
            _module(*beside, "--batch", "1", "--compile"),
            60,
            "export",
            modules=_TORCH,
        ),
    ]


def chosen(known: Sequence[Step], only: str) -> list[Step]:
    """Return the steps whose names hold `only`, and those that these need.

    Raises:
        click.BadParameter: there is none.
    """
    names = {step.name for step in known if only in step.name}
    if not names:
        listed = ", ".join(step.name for step in known)
        raise click.BadParameter(f"--only: expected a part of {listed}; came {only}")
    names |= {step.needs for step in known if step.name in names}
    return [step for step in known if step.name in names]


def _command(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"from {module} import main; main()", *arguments)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *arguments)
