# ruff: noqa: D102, the methods are described in device.py
"""The two ways from Python to CUDA; see `device`, which says what each method does.

Nothing here can be tested without a GPU: it is kept thin.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import BackendError

_NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_LONGEST_VERSION = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class PyCuda:
    """Through pycuda's driver interface, which has no graphs."""

    graphs = False

    def __init__(self, driver: Any, ordinal: int) -> None:
        self._cuda = driver
        driver.init()
        _check_ordinal(ordinal, driver.Device.count())
        device = driver.Device(ordinal)
        major, minor = device.compute_capability()
        self.ordinal, self.name, self.sm = ordinal, device.name(), 10 * major + minor
        self.driver = _driver_version(driver.get_driver_version())
        self._context = device.retain_primary_context()
        self._memory: dict[int, Any] = {}  # freed as soon as nothing refers to it

    @contextmanager
    def active(self) -> Iterator[None]:
        # Each thread has a stack of contexts; pycuda ends the process of a thread that leaves one.
        self._context.push()
        try:
            yield
        except self._cuda.Error as cause:
            raise BackendError(f"CUDA: {cause}") from cause
        finally:
            self._context.pop()

    def allocate(self, size: int) -> int:
        memory = self._cuda.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def pinned(self, size: int) -> NDArray[np.uint8]:
        memory: NDArray[np.uint8] = self._cuda.pagelocked_empty(size, np.uint8)
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        base: Any = memory.base
        base.free()

    def stream(self) -> Any:
        return _PyCudaStream(self._cuda.Stream(1))  # CU_STREAM_NON_BLOCKING

    def free_stream(self, stream: Any) -> None:
        del stream.own

    def to_device(self, address: int, memory: NDArray[np.uint8], stream: Any) -> None:
        self._cuda.memcpy_htod_async(address, memory, stream.own)

    def to_host(self, memory: NDArray[np.uint8], address: int, stream: Any) -> None:
        self._cuda.memcpy_dtoh_async(memory, address, stream.own)

    def synchronize(self, stream: Any) -> None:
        stream.own.synchronize()

    def record(self, stream: Any) -> Any:
        return self._cuda.Event().record(stream.own)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return float(second.time_since(first))

    def free_event(self, event: Any) -> None:
        del event  # goes with the last reference

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        raise BackendError("pycuda has no CUDA graphs; install cuda-python in its place")

    def launch(self, graph: Any, stream: Any) -> None:
        raise BackendError("pycuda has no CUDA graphs")

    def free_graph(self, graph: Any) -> None:
        raise BackendError("pycuda has no CUDA graphs")


class _PyCudaStream:
    def __init__(self, own: Any) -> None:
        self.own = own

    def __int__(self) -> int:
        return int(self.own.handle)


class CudaPython:
    """Through the runtime interface of cuda-python, which returns its errors."""

    graphs = True

    def __init__(self, runtime: Any, ordinal: int) -> None:
        self._cuda = runtime
        _check_ordinal(ordinal, self._call("cudaGetDeviceCount"))
        properties = self._call("cudaGetDeviceProperties", ordinal)
        self.ordinal = ordinal
        self.name = properties.name.split(b"\0")[0].decode()
        self.sm = 10 * properties.major + properties.minor
        self.driver = _driver_version(self._call("cudaDriverGetVersion"))

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error):
            text = self._cuda.cudaGetErrorString(error)[1].decode()
            raise BackendError(f"CUDA: {name} failed: {text}")
        return results[0] if results else None

    @contextmanager
    def active(self) -> Iterator[None]:
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.ordinal)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        address = int(self._call("cudaMallocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        self._call("cudaFreeHost", memory.ctypes.data)

    def stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def free_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def to_device(self, address: int, memory: NDArray[np.uint8], stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, memory.ctypes.data, memory.nbytes, kind, stream)

    def to_host(self, memory: NDArray[np.uint8], address: int, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", memory.ctypes.data, address, memory.nbytes, kind, stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def record(self, stream: Any) -> Any:
        event = self._call("cudaEventCreate")
        self._call("cudaEventRecord", event, stream)
        return event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return float(self._call("cudaEventElapsedTime", first, second))

    def free_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:  # a stream that is still capturing is of no use any more
            graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)


def _check_ordinal(ordinal: int, count: int) -> None:
    if not 0 <= ordinal < count:
        raise BackendError(f"GPU {ordinal}: expected a number from 0 to {count - 1}")


def _driver_version(cuda: int) -> str:
    """Return the driver's own version, where NVML knows it, and that of CUDA, 13000 for 13.0."""
    newest = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    try:
        nvml = ctypes.CDLL(_NVML)
        version = ctypes.create_string_buffer(_LONGEST_VERSION)
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
            return newest
    except (OSError, AttributeError):  # Jetsons have none
        return newest
    return f"{version.value.decode()}, {newest}"
