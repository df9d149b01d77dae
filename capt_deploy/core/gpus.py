"""NVIDIA GPUs of this machine, as NVML and the CUDA driver report them."""

import ctypes
import os
import sys
import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

_CUDA = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NVIDIA = "0x10de"  # PCI vendor
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, CUDA driver API
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_SECONDS = 20  # a driver that starts for the first time is slow; a broken one hangs


@dataclass(frozen=True)
class Gpu:
    """One GPU; a field is None where the driver does not report it."""

    name: str
    sm: int | None = None  # 89 for compute capability 8.9
    driver: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None  # by all programs
    clock_sm_mhz: int | None = None  # at this moment
    clock_sm_max_mhz: int | None = None
    clock_memory_mhz: int | None = None
    power_limit_w: float | None = None


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver and the GPUs that it lists."""

    gpus: tuple[Gpu, ...]
    problem: str | None  # why CUDA can use no GPU; None if it can
    cuda: str | None = None  # newest CUDA version that the driver runs, such as "13.0"


def find_driver() -> Driver:
    """Return the driver, its GPUs and why they cannot be used; never raises."""
    driver, problem = _ask_nvml(), gpu_problem()
    if problem is not None:
        silence = "" if driver.gpus else f" ({driver.problem})"
        return replace(driver, problem=f"{problem}{silence}")
    # NVML is missing on some Jetsons and in slim containers, where CUDA works all the same.
    return replace(driver, problem=None) if driver.gpus else _ask_cuda()


def query_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that NVML lists, whether visible to CUDA or not; none without NVML."""
    return _ask_nvml().gpus


@cache
def gpu_problem() -> str | None:
    """Return why CUDA finds no GPU, with the fix; None if it finds one.

    `cuInit` fails in forked copies of a process that has called it: start processes by spawning.
    """
    bus = f"{'an' if _is_on_the_bus() else 'no'} NVIDIA GPU is on the PCI bus"
    try:
        cuda = ctypes.CDLL(_CUDA)
    except OSError:
        return (
            f"expected NVIDIA's driver, found no {_CUDA}; {bus}; where there is a GPU, install "
            f"the driver, and give containers the GPU (--gpus all)"
        )
    devices = ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(devices))
    if status == _NO_DEVICE or (status == 0 and devices.value == 0):
        return f"the driver shows no GPU; {bus}; is CUDA_VISIBLE_DEVICES set?"
    return None if status == 0 else f"the driver failed with CUDA error {status}; {bus}; see dmesg"


def gpu_name(ordinal: int) -> str:
    """Return the name of CUDA's GPU `ordinal`, such as "NVIDIA H100 80GB HBM3"; "" if unknown.

    Call it only where `gpu_problem` returns None. NVML may number the GPUs differently.
    """
    cuda, device, name = ctypes.CDLL(_CUDA), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        return ""
    return "" if cuda.cuDeviceGetName(name, len(name), device) else name.value.decode()


def _ask_cuda() -> Driver:
    """Return the driver with the GPUs that CUDA lists; only where `gpu_problem` returns None."""
    cuda, value, size = ctypes.CDLL(_CUDA), ctypes.c_int(), ctypes.c_size_t()

    def read(function: str, *arguments: int) -> int:
        getattr(cuda, function)(ctypes.byref(value), *arguments)
        return value.value

    gpus = []
    for ordinal in range(read("cuDeviceGetCount")):
        device = read("cuDeviceGet", ordinal)
        major, minor = (read("cuDeviceGetAttribute", n, device) for n in (_MAJOR, _MINOR))
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        gpus.append(Gpu(gpu_name(ordinal), 10 * major + minor, memory_bytes=size.value or None))
    return Driver(tuple(gpus), None, _version(read("cuDriverGetVersion")))


def _version(cuda: int | None) -> str | None:
    """Return a version of CUDA as text: 13000 is 13.0."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None


def nvidia_gpu_is_here() -> bool:
    """Return whether there is an NVIDIA GPU, usable or not, that is not hidden from CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return gpu_problem() is None or (_is_on_the_bus() and not hidden)


def _ask_nvml() -> Driver:
    """Return the driver with its GPUs; `problem` says why NVML lists none."""
    answers: list[Driver] = []
    # A driver that hangs cannot be interrupted: it may keep the thread, but not the program.
    thread = threading.Thread(target=lambda: answers.append(_read_nvml()), daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return answers[0] if answers else Driver((), f"NVML did not answer within {_SECONDS} s")


def _read_nvml() -> Driver:
    import pynvml as nvml

    def read(function: str, *arguments: Any) -> Any:
        """Return None for what this GPU or driver does not support."""
        try:
            return getattr(nvml, function)(*arguments)
        except nvml.NVMLError:
            return None

    def read_gpu(index: int) -> Gpu:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        capability = read("nvmlDeviceGetCudaComputeCapability", handle)
        memory = read("nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2)
        milliwatts = read("nvmlDeviceGetPowerManagementLimit", handle)
        return Gpu(
            name=read("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            sm=capability and 10 * capability[0] + capability[1],
            driver=read("nvmlSystemGetDriverVersion"),
            memory_bytes=memory and memory.total,
            memory_used_bytes=memory and memory.used,
            clock_sm_mhz=read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            clock_sm_max_mhz=read("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            clock_memory_mhz=read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            power_limit_w=milliwatts and milliwatts / 1000,
        )

    try:
        nvml.nvmlInit()
        try:
            gpus = tuple(map(read_gpu, range(nvml.nvmlDeviceGetCount())))
            cuda = read("nvmlSystemGetCudaDriverVersion_v2")
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as cause:
        return Driver((), f"NVML: {cause}")
    return Driver(gpus, "NVML lists no GPU", _version(cuda))


def _is_on_the_bus(root: Path = Path("/")) -> bool:
    """Return whether Linux lists a display controller (PCI class 03) of NVIDIA's."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        try:
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == _NVIDIA and kind.startswith("0x03"):
                return True
        except OSError:  # removed meanwhile
            continue
    return False
