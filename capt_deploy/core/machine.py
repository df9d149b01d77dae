"""This machine: cores, memory, processor, GPUs, and the packages installed on it."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from capt_deploy.core.gpus import find_driver, query_gpus
from capt_deploy.core.version import __version__

# Names of distributions; several may bring the same module.
RUNTIME = ("numpy", "pillow", "cuda-bindings", "pycuda")


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed; imports nothing."""
    packages = {}
    for name in names:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return packages


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python, capt and the packages that predict.

    Args:
        libraries: distributions of the backends, see `capt_deploy.backends.spec`.
    """
    packages = installed((*RUNTIME, *libraries))
    return {"python": platform.python_version(), "capt": __version__, **packages}


def describe_host() -> dict[str, Any]:
    """Return operating system, processor and memory."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": _total_memory(),
    }


def describe_machine() -> dict[str, Any]:
    """Return `describe_host` and the GPUs with their clocks at this moment."""
    return {**describe_host(), "gpus": [asdict(gpu) for gpu in find_driver().gpus]}


def resident_memory() -> int | None:
    """Return the bytes of memory that this process holds now (RSS); None where unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def gpu_memory_used() -> int | None:
    """Return the bytes in use on all GPUs, by all programs; None where NVML does not say."""
    used = [gpu.memory_used_bytes for gpu in query_gpus()]
    return None if not used or None in used else sum(value or 0 for value in used)


def usable_cores(root: Path = Path("/")) -> int:
    """Return the physical cores that this process may compute on, at least 1.

    These are the cores of the CPUs that the process is bound to, limited by the quotas of its
    control groups (v2, then v1), as in containers.

    Args:
        root: the folder that holds Linux' `sys` and `proc`.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
    folder = root / "sys/devices/system/cpu"
    # Two threads of one core compute no faster than one.
    physical = {_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in cpus}
    return max(1, min(len(physical), *_quotas(root), len(cpus)))


def _quotas(root: Path) -> list[int]:
    """Return the limits, in whole cores, of the process's control group and those around it."""
    groups = root / "sys/fs/cgroup"
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / "cpu" if controllers else groups
        group = top / path.strip("/")
        # In a container the path may be the host's; then only the top exists.
        for folder in (group, *group.parents):
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            try:
                quota, period = map(int, " ".join(_text(folder / name) for name in files).split())
                limits += [quota // period] if quota > 0 else []
            except (ValueError, ZeroDivisionError):  # "max", or no such file
                pass
            if folder == top:
                break
    return limits


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_features() -> str:
    """Return the processor's instruction sets as Linux lists them; "" where unknown."""
    return _cpu_info("flags", "Features")


def _cpu_name() -> str:
    """Return the processor's name, or its architecture where the system gives no name."""
    return _cpu_info("model name", "Model") or platform.processor() or platform.machine()


def _cpu_info(*names: str) -> str:
    """Return the first value that Linux gives under one of the names; "" if there is none."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names and value.strip():
            return value.strip()
    return ""


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
