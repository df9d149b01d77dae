"""Diagnose a machine: its packages and GPUs, the backends that work, and fixes for the others."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capt_deploy.backends import AUTO
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.gpus import Driver, find_driver
from capt_deploy.core.install import install_hint
from capt_deploy.core.machine import RUNTIME, describe_host, installed
from capt_deploy.core.version import __version__
from capt_deploy.doctor.probe import ProbeResult, probe_backend

# Looked up, never imported.
_OTHERS = ("cuda-python", "torch", "open_clip_torch", "onnx", "click", "safetensors")
_DRIVER = (
    "on a machine with an NVIDIA GPU, install its driver (nvidia.com/drivers), and start "
    "containers with --gpus all"
)
_OF_CUDA = ("cuda-bindings", "pycuda")  # either gives memory and streams to TensorRT
# TensorRT-RTX is for GPUs with RTX; these generations of data centre GPUs have none.
_WITHOUT_RTX = {90, 100, 103}
_ONE_ONNX_RUNTIME = (
    "pip uninstall -y onnxruntime onnxruntime-gpu; pip install --no-cache-dir onnxruntime-gpu"
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
    problems: tuple[str, ...]  # of the machine, whichever the backend; each with its fix
    backends: tuple[Finding, ...]

    @property
    def chosen(self) -> str | None:
        """The backend that `auto` takes; None if none works."""
        return next((finding.name for finding in self.backends if finding.usable), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        return {**asdict(self), "chosen": self.chosen}


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
    facts = Facts(installed((*RUNTIME, *_OTHERS)), find_driver())
    findings = tuple(_examine(name, facts, bundle, attempt) for name in AUTO)
    return Diagnosis(
        {"capt": __version__, "python": platform.python_version(), **facts.packages},
        {**describe_host(), "cores_of_machine": os.cpu_count()},
        facts.driver,
        tuple(problems(facts, findings)),
        findings,
    )


def _examine(name: str, facts: Facts, bundle: Path | None, attempt: Try) -> Finding:
    if name != "onnxruntime-cpu" and facts.driver.problem is not None:
        reason = "needs an NVIDIA GPU, and the driver gives none; see there"
        return Finding(name, False, None, reason, fix_of(name, facts), 0.0)
    trial = attempt(name, bundle)
    usable = trial.device is not None
    fix = None if usable else fix_of(name, facts)
    return Finding(name, usable, trial.device, trial.reason, fix, trial.seconds)


def fix_of(name: str, facts: Facts) -> str:
    """Return the line that most likely makes a backend work that does not."""
    if name != "onnxruntime-cpu" and facts.driver.problem is not None:
        hidden = facts.driver.gpus and "CUDA_VISIBLE_DEVICES" in os.environ
        return "unset CUDA_VISIBLE_DEVICES" if hidden else _DRIVER
    return _fix_of_tensorrt(name, facts) if "tensorrt" in name else _fix_of_onnx(name, facts)


def _fix_of_tensorrt(name: str, facts: Facts) -> str:
    sms = {gpu.sm for gpu in facts.driver.gpus}
    if name == "tensorrt-rtx" and sms and sms <= _WITHOUT_RTX:
        return f"TensorRT-RTX is not made for this GPU: {install_hint('tensorrt')}"
    if name not in facts.packages:
        return install_hint(name)
    if not any(package in facts.packages for package in _OF_CUDA):
        return "pip install cuda-python"
    return f"pip install --upgrade --force-reinstall {name}"


def _fix_of_onnx(name: str, facts: Facts) -> str:
    if _both(facts):
        return _ONE_ONNX_RUNTIME
    if name == "onnxruntime-cpu":
        there = "onnxruntime-gpu" if "onnxruntime-gpu" in facts.packages else "onnxruntime"
        return f"pip install --force-reinstall {there}"
    if "onnxruntime-gpu" in facts.packages:  # then CUDA's own libraries are missing, or too old
        return "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"
    return "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"


def _both(facts: Facts) -> bool:
    return {"onnxruntime", "onnxruntime-gpu"} <= facts.packages.keys()


def problems(facts: Facts, findings: tuple[Finding, ...]) -> list[str]:
    """Return what is wrong whichever backend is used, each with its fix."""
    found = []
    if _both(facts):
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            + _ONE_ONNX_RUNTIME
        )
    works = [finding.name for finding in findings if finding.usable]
    if facts.driver.gpus and works == ["onnxruntime-cpu"]:
        fixes = "; or ".join(dict.fromkeys(f.fix for f in findings if f.fix))
        found.append(f"there is an NVIDIA GPU, but only the CPU works: {fixes}")
    if not works:
        found.append(f"no backend works: {fix_of('onnxruntime-cpu', facts)}")
    return found
