"""How many cores this process may use, which may be far fewer than the machine has."""

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Return the physical cores that this process may compute on, at least 1.

    Counted are the cores of the CPUs that the process is bound to, at most as many as its control
    groups (v2, then v1) give it time for, as in containers with a limit.

    Args:
        root: where Linux' `sys` and `proc` lie.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
    return max(1, min(_physical(cpus, root), *_quotas(root), len(cpus)))


def _physical(cpus: set[int], root: Path) -> int:
    """Return how many cores these CPUs are: two threads of one core compute no faster than one."""
    folder = root / "sys/devices/system/cpu"
    return len(
        {_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    )


def _quotas(root: Path) -> list[int]:
    """Return the limits, in whole cores, of the process's control group and those around it."""
    groups = root / "sys/fs/cgroup"
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / "cpu" if controllers else groups
        own = top / path.strip("/")
        # In a container the path may be the host's; then only the top is there.
        for folder in (own, *own.parents):
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            limits += _whole(" ".join(_text(folder / file) for file in files))
            if folder == top:
                break
    return limits


def _whole(limit: str) -> list[int]:
    """Return the cores that a limit is, "quota period" in microseconds; nothing if it is none."""
    try:
        quota, period = map(int, limit.split())
        return [quota // period] if quota > 0 else []
    except (ValueError, ZeroDivisionError):  # "max", or not there
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
