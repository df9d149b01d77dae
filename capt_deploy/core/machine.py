"""What a figure or a report has to say of the machine and of what is installed on it."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from capt_deploy.core.cores import usable_cores
from capt_deploy.core.nvidia import find_driver, query_gpus
from capt_deploy.core.version import __version__

# Names of distributions; several may bring the same module.
RUNTIME = (
    *("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("cuda-bindings", "pycuda"),
)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions that are installed; nothing is imported."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """Return what predictions are made with here."""
    return {"python": platform.python_version(), "capt": __version__, **installed(RUNTIME)}


def describe_host() -> dict[str, Any]:
    """Return operating system, processor and memory."""
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": total_memory(),
    }


def describe_machine() -> dict[str, Any]:
    """Return these, and GPUs with their clocks at this moment."""
    return {**describe_host(), "gpus": [asdict(gpu) for gpu in find_driver().gpus]}


def cpu_name() -> str:
    """Return the processor's name, or its architecture where nothing says more."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Return the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, or a system that does not tell
        return None


def resident_memory() -> int | None:
    """Return the bytes of memory that this process holds now (RSS); None where unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def gpu_memory_used() -> int | None:
    """Return the bytes in use on all GPUs, by everybody; None where there is no `nvidia-smi`."""
    used = [gpu.memory_used_bytes for gpu in query_gpus()]
    return None if not used or None in used else sum(value or 0 for value in used)
