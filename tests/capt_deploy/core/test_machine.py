"""The machine's description, and the cores that this process may use."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from capt_deploy.core import machine
from capt_deploy.core.machine import usable_cores


def test_versions_are_those_that_are_installed():
    info = machine.versions(["onnxruntime"])
    assert info["numpy"] == metadata.version("numpy")
    assert info["python"].startswith("3.")
    assert machine.installed(["numpy", "no-such-package"]) == {"numpy": info["numpy"]}


def test_the_machine_can_be_written_as_json():
    info = machine.describe_machine()
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info.keys() == {"system", "cpu", "cores", "memory_bytes", "gpus"}
    assert info["cpu"] and 1 <= info["cores"] <= os.cpu_count()


def test_resident_memory_grows_with_what_is_held():
    # In a process of its info: one that has run other tests gives back memory of theirs meanwhile.
    code = (
        "from capt_deploy.core.machine import resident_memory as now\n"
        "before = now(); held = b'x' * 30_000_000; after = now()\n"
        "print(before is None or 25e6 < after - before < 60e6)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight CPUs, two threads a core, on a system without limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for cpu in range(8):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % 4},{cpu % 4 + 4}\n",
        )
    write(tmp_path / "proc/self/cgroup", "0::/app/web\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_two_threads_of_a_core_are_one(root: Path) -> None:
    assert usable_cores(root) == 4


def test_a_process_bound_to_some_cpus_has_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert usable_cores(root) == 2


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("300000 100000", 3), ("50000 100000", 1), ("250000 100000", 2), ("max 100000", 4), ("", 4)],
)
@pytest.mark.parametrize("group", ["app/web", "app", ""])
def test_a_limit_of_any_group_around_it_counts(
    root: Path, group: str, limit: str, expected: int
) -> None:
    write(root / "sys/fs/cgroup" / group / "cpu.max", limit)
    assert usable_cores(root) == expected


def test_limits_of_version_one_count_as_well(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/app\n0::/\n")
    write(root / "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", "200000\n")
    write(root / "sys/fs/cgroup/cpu/app/cpu.cfs_period_us", "100000\n")
    assert usable_cores(root) == 2
    write(root / "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", "-1\n")
    assert usable_cores(root) == 4


def test_where_nothing_is_told_all_cpus_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert usable_cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


def test_here_it_is_a_number_of_cores() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
