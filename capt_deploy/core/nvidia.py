"""What NVIDIA's driver says of its GPUs, through `nvidia-smi` or, where that is missing, libcuda.

No package is needed, and nothing here starts work on a GPU.
"""

import csv
import ctypes
import io
import subprocess
from dataclasses import dataclass

from capt_deploy.core.driver import LIBRARY, gpu_problem

_SECONDS = 20  # a driver that starts up for the first time is slow; a broken one hangs
_FIELDS = (
    *("name", "compute_cap", "driver_version", "memory.total", "memory.used"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"),
)
_MEBIBYTE = 2**20
_MAJOR, _MINOR = 75, 76  # CUDA's own numbers of a device's attributes


@dataclass(frozen=True)
class Gpu:
    """One GPU; None is what could not be found out."""

    name: str
    sm: int | None = None  # 89 for compute capability 8.9
    driver: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None  # by everybody
    clock_sm_mhz: int | None = None  # at this moment
    clock_sm_max_mhz: int | None = None
    clock_memory_mhz: int | None = None
    power_limit_w: float | None = None


@dataclass(frozen=True)
class Driver:
    """What there is of NVIDIA's on this machine."""

    gpus: tuple[Gpu, ...]
    problem: str | None  # why programs can use none, if they cannot
    cuda: str | None = None  # the newest version of CUDA that it takes, such as "13.0"


def find_driver() -> Driver:
    """Ask the driver what it has; never raises."""
    gpus, silent = _ask_smi()
    problem = gpu_problem()
    if gpus or problem is None:
        return Driver(gpus or _ask_libcuda(), problem, _newest_cuda())
    return Driver((), f"{problem} ({silent})", _newest_cuda())


def query_gpus() -> tuple[Gpu, ...]:
    """Return what `nvidia-smi` says; nothing where there is none."""
    return _ask_smi()[0]


def _ask_smi() -> tuple[tuple[Gpu, ...], str]:
    words = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        return (), "nvidia-smi is not there"
    except (OSError, subprocess.TimeoutExpired) as cause:
        return (), f"nvidia-smi does not answer ({cause})"
    if done.returncode:
        said = " ".join(f"{done.stdout} {done.stderr}".split()) or f"exit code {done.returncode}"
        return (), f"nvidia-smi says: {said[:200]}"
    gpus = parse_smi(done.stdout)
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """Read the CSV of `nvidia-smi`, a line for each GPU; fields that it does not know are None."""
    gpus = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(_FIELDS):
            continue
        name, sm, driver, *rest = row
        total, used, clock, highest, memory, power = map(_number, rest)
        capability = _number(sm)
        gpus.append(
            Gpu(
                name=name,
                sm=None if capability is None else round(10 * capability),
                driver=driver if _number(driver.split(".")[0]) is not None else None,
                memory_bytes=None if total is None else int(total * _MEBIBYTE),
                memory_used_bytes=None if used is None else int(used * _MEBIBYTE),
                clock_sm_mhz=None if clock is None else int(clock),
                clock_sm_max_mhz=None if highest is None else int(highest),
                clock_memory_mhz=None if memory is None else int(memory),
                power_limit_w=power,
            )
        )
    return tuple(gpus)


def _number(text: str) -> float | None:
    try:
        return float(text)  # it writes [N/A], [Not Supported], [Unknown Error] and more
    except ValueError:
        return None


def _ask_libcuda() -> tuple[Gpu, ...]:
    """Ask libcuda, which works, for what `nvidia-smi` does not say, as in slim containers."""
    cuda, count = ctypes.CDLL(LIBRARY), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return tuple(_gpu_of(cuda, ordinal) for ordinal in range(count.value))


def _newest_cuda() -> str | None:
    version = ctypes.c_int()
    try:
        ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None


def _gpu_of(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device = ctypes.c_int()
    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_attribute(cuda, number, device) for number in (_MAJOR, _MINOR))
    return Gpu(name.value.decode(errors="replace"), 10 * major + minor, None, memory.value or None)


def _attribute(cuda: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value
