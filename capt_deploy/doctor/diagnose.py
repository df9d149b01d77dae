"""Diagnose a machine: its packages and GPUs, the backends that work, and fixes for the others."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capt_deploy.backends.spec import BackendSpec, find_backends, library_packages
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.gpus import Driver, find_driver
from capt_deploy.core.jetson import jetson_linux
from capt_deploy.core.machine import RUNTIME, describe_host, installed
from capt_deploy.core.version import __version__
from capt_deploy.doctor.probe import ProbeResult, probe_backend

# Looked up, never imported.
_OTHERS = ("cuda-python", "torch", "open_clip_torch", "onnx", "click", "safetensors")
_DRIVER = (
    "on a machine with an NVIDIA GPU, install its driver (nvidia.com/drivers), and start "
    "containers with --gpus all (on a Jetson: --runtime nvidia)"
)
Try = Callable[[str, Path | None], ProbeResult]


@dataclass(frozen=True)
class Facts:
    """The installed packages and the driver, on which fixes depend."""

    packages: Mapping[str, str]  # version by name
    driver: Driver


@dataclass(frozen=True)
class Finding:
    """Whether a backend works, and how to fix it."""

    name: str
    usable: bool
    device: str | None
    reason: str | None  # why it is not usable
    fix: str | None  # one line that most likely makes it usable
    seconds: float  # spent on trying it


@dataclass(frozen=True)
class Diagnosis:
    """The result of `capt-doctor`."""

    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    driver: Driver
    problems: tuple[str, ...]  # of the machine, for any backend; each with its fix
    backends: tuple[Finding, ...]

    @property
    def chosen(self) -> str | None:
        """Return the backend that `auto` takes; None if none works.

        Where only CPUs work it is the first of those that `auto` measures, see `measured`.
        """
        return next((finding.name for finding in self.backends if finding.usable), None)

    @property
    def measured(self) -> tuple[str, ...]:
        """Return the backends among which `auto` takes the fastest; none where it has no choice."""
        usable = tuple(finding for finding in self.backends if finding.usable)
        on_cpu = all(finding.device == "cpu" for finding in usable)
        return tuple(f.name for f in usable) if on_cpu and len(usable) > 1 else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        return {**asdict(self), "chosen": self.chosen, "measured": list(self.measured)}


def diagnose(bundle: Path | None = None, attempt: Try = probe_backend) -> Diagnosis:
    """Inspect the machine and try every backend.

    Args:
        bundle: what the backends run; by default a tiny graph.
        attempt: tries a backend.

    Raises:
        BundleError: the bundle is damaged.
    """
    if bundle is not None:
        opened = open_bundle(bundle)
        opened.graph(opened.precisions[0])
    facts = Facts(installed((*RUNTIME, *library_packages(), *_OTHERS)), find_driver())
    findings = tuple(_examine(spec, facts, bundle, attempt) for spec in find_backends())
    return Diagnosis(
        {"capt": __version__, "python": platform.python_version(), **facts.packages},
        {**describe_host(), "cores_of_machine": os.cpu_count(), "jetson_linux": jetson_linux()},
        facts.driver,
        tuple(problems(facts, findings)),
        findings,
    )


def _examine(spec: BackendSpec, facts: Facts, bundle: Path | None, attempt: Try) -> Finding:
    if spec.needs_gpu and facts.driver.problem is not None:
        reason = "needs an NVIDIA GPU, which the driver does not provide"
        return Finding(spec.name, False, None, reason, fix_of(spec, facts), 0.0)
    result = attempt(spec.name, bundle)
    usable = result.device is not None
    fix = None if usable else fix_of(spec, facts)
    return Finding(spec.name, usable, result.device, result.reason, fix, result.seconds)


def fix_of(spec: BackendSpec, facts: Facts) -> str:
    """Return one line that most likely makes a backend work."""
    if spec.needs_gpu and facts.driver.problem is not None:
        hidden = facts.driver.gpus and "CUDA_VISIBLE_DEVICES" in os.environ
        return "unset CUDA_VISIBLE_DEVICES" if hidden else _DRIVER
    return spec.fix(facts.packages, {gpu.sm for gpu in facts.driver.gpus if gpu.sm is not None})


def problems(facts: Facts, findings: tuple[Finding, ...]) -> list[str]:
    """Return the problems of the machine, for any backend, each with its fix."""
    specs = find_backends()
    lines = [text for spec in specs if (text := _clash(spec, facts)) is not None]
    works = {finding.name for finding in findings if finding.usable}
    if facts.driver.gpus and works and not any(s.needs_gpu for s in specs if s.name in works):
        fixes = "; or ".join(dict.fromkeys(f.fix for f in findings if f.fix))
        lines.append(f"there is an NVIDIA GPU, but only the CPU works: {fixes}")
    if not works:
        fixes = "; or ".join(fix_of(spec, facts) for spec in specs if not spec.needs_gpu)
        lines.append(f"no backend works: {fixes}")
    return list(dict.fromkeys(lines))


def _clash(spec: BackendSpec, facts: Facts) -> str | None:
    """Return a problem if several installed packages contain the library of a backend."""
    packages = sorted(name for name in spec.packages if name in facts.packages)
    if len(packages) < 2:
        return None
    names = " and ".join(packages)
    fix = spec.fix(facts.packages, ())
    return f"{names} are both installed and overwrite each other's files: {fix}"
