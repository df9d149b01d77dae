"""Ask NVIDIA's driver for GPUs, with nothing but the driver itself; no CUDA library is needed."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NVIDIA = "0x10de"  # PCI vendor
_LONGEST_NAME = 256
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, CUDA driver API


@cache
def gpu_problem() -> str | None:
    """Return why CUDA finds no GPU here, with the fix; None if it finds one.

    `cuInit` fails in forked copies of a process that has called it: start processes by spawning.
    """
    there = "; an NVIDIA GPU is on the bus" if _is_on_the_bus() else ""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return (
            f"expected NVIDIA's driver, found no {LIBRARY}{there}; install the driver, and give "
            f"containers the GPU (--gpus all)"
        )
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        return f"the driver shows no GPU{there}; is CUDA_VISIBLE_DEVICES set?"
    return None if status == 0 else f"the driver failed with CUDA error {status}{there}; see dmesg"


def gpu_name(ordinal: int) -> str:
    """Return what the driver calls a GPU, such as "NVIDIA H100 80GB HBM3"; "" if it says nothing.

    To be asked only where `gpu_problem` finds none.
    """
    driver = ctypes.CDLL(LIBRARY)
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(_LONGEST_NAME)
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return ""
    return "" if driver.cuDeviceGetName(name, len(name), device) else name.value.decode()


def nvidia_gpu_is_here() -> bool:
    """Tell whether there is an NVIDIA GPU, usable or not, that nobody has hidden from CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return gpu_problem() is None or (_is_on_the_bus() and not hidden)


def _is_on_the_bus(root: Path = Path("/")) -> bool:
    """Tell whether Linux lists a display controller (PCI class 03) of NVIDIA's."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        try:
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == _NVIDIA and kind.startswith("0x03"):
                return True
        except OSError:  # taken away meanwhile
            continue
    return False
