"""One GPU: memory, streams, events and CUDA graphs. All calls of CUDA are here.

They go through NVIDIA's cuda-python where it is installed, else through pycuda. Both work in the
primary context of the GPU, as TensorRT does. Without a GPU none of this can be tested: it is thin.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_problem, query_gpus
from capt_deploy.core.jetson import cuda_hint

Bytes = NDArray[np.uint8]  # (bytes,)


class CudaPython:
    """A GPU through the runtime API of cuda-python, which returns its errors.

    Every method belongs inside `with device.active():`, in any thread, and raises `BackendError`
    with CUDA's reason where it fails.
    """

    graphs = True  # whether `capture` works

    def __init__(self, runtime: Any, ordinal: int) -> None:
        self._cuda = runtime
        _check_ordinal(ordinal, self._call("cudaGetDeviceCount"))
        properties = self._call("cudaGetDeviceProperties", ordinal)
        self.ordinal = ordinal
        self.name = properties.name.split(b"\0")[0].decode()  # "NVIDIA GeForce RTX 4090"
        self.sm = 10 * properties.major + properties.minor  # compute capability, 89 for 8.9
        self.driver = _driver_version(self._call("cudaDriverGetVersion"))  # "580.65.06, CUDA 13.0"

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error):
            text = self._cuda.cudaGetErrorString(error)[1].decode()
            raise BackendError(f"CUDA: {name} failed: {text}")
        return results[0] if results else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the GPU of the calling thread meanwhile."""
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self.ordinal)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Free memory on the GPU."""
        self._call("cudaFree", address)

    def pinned(self, size: int) -> Bytes:
        """Return `size` bytes of host memory that the GPU reads and writes by itself."""
        address = int(self._call("cudaMallocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        """Free pinned memory, which nobody may use any more."""
        self._call("cudaFreeHost", memory.ctypes.data)

    def stream(self) -> Any:
        """Return a new stream, whose `int()` is its handle."""
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def free_stream(self, stream: Any) -> None:
        """Free a stream."""
        self._call("cudaStreamDestroy", stream)

    def to_device(self, address: int, memory: Bytes, stream: Any) -> None:
        """Copy pinned memory to the GPU, once the stream reaches this point."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, memory.ctypes.data, memory.nbytes, kind, stream)

    def to_host(self, memory: Bytes, address: int, stream: Any) -> None:
        """Fill pinned memory from the GPU, once the stream reaches this point."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", memory.ctypes.data, address, memory.nbytes, kind, stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until the stream has done all its work."""
        self._call("cudaStreamSynchronize", stream)

    def record(self, stream: Any) -> Any:
        """Return a new event with the time at which the stream reaches this point."""
        event = self._call("cudaEventCreate")
        self._call("cudaEventRecord", event, stream)
        return event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Return the milliseconds between two events that have happened."""
        return float(self._call("cudaEventElapsedTime", first, second))

    def free_event(self, event: Any) -> None:
        """Free an event."""
        self._call("cudaEventDestroy", event)

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """Return a CUDA graph of the calls that `work` makes on the stream; none of them runs."""
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
        """Run a CUDA graph, once the stream reaches this point."""
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Free a CUDA graph."""
        self._call("cudaGraphExecDestroy", graph)


# ruff: noqa: D102, the methods of PyCuda are described at CudaPython
class PyCuda:
    """A GPU through pycuda's driver API: the same methods as `CudaPython`, without CUDA graphs."""

    graphs = False

    def __init__(self, driver: Any, ordinal: int) -> None:
        self._cuda = driver
        self._call(driver.init)
        _check_ordinal(ordinal, self._call(driver.Device.count))
        device = self._call(driver.Device, ordinal)
        major, minor = self._call(device.compute_capability)
        self.ordinal, self.name, self.sm = ordinal, device.name(), 10 * major + minor
        self.driver = _driver_version(self._call(driver.get_driver_version))
        self._context = self._call(device.retain_primary_context)
        self._memory: dict[int, Any] = {}  # freed as soon as nothing refers to it

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._cuda.Error as cause:
            raise BackendError(f"CUDA: {cause}") from cause

    @contextmanager
    def active(self) -> Iterator[None]:
        # Each thread has a stack of contexts; pycuda ends the process of a thread that leaves one.
        self._call(self._context.push)
        try:
            yield
        finally:
            self._context.pop()

    def allocate(self, size: int) -> int:
        memory = self._call(self._cuda.mem_alloc, size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._call(self._memory.pop(address).free)

    def pinned(self, size: int) -> Bytes:
        memory: Bytes = self._call(self._cuda.pagelocked_empty, size, np.uint8)
        return memory

    def free_pinned(self, memory: Bytes) -> None:
        base: Any = memory.base
        self._call(base.free)

    def stream(self) -> Any:
        return _PyCudaStream(self._call(self._cuda.Stream, 1))  # CU_STREAM_NON_BLOCKING

    def free_stream(self, stream: Any) -> None:
        del stream.stream

    def to_device(self, address: int, memory: Bytes, stream: Any) -> None:
        self._call(self._cuda.memcpy_htod_async, address, memory, stream.stream)

    def to_host(self, memory: Bytes, address: int, stream: Any) -> None:
        self._call(self._cuda.memcpy_dtoh_async, memory, address, stream.stream)

    def synchronize(self, stream: Any) -> None:
        self._call(stream.stream.synchronize)

    def record(self, stream: Any) -> Any:
        event = self._call(self._cuda.Event)
        self._call(event.record, stream.stream)
        return event

    def elapsed_ms(self, first: Any, second: Any) -> float:
        return float(self._call(second.time_since, first))

    def free_event(self, event: Any) -> None:
        del event  # goes with the last reference

    def capture(self, *_: Any) -> Any:
        raise BackendError("pycuda has no CUDA graphs; install cuda-python in its place")

    launch = free_graph = capture


class _PyCudaStream:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __int__(self) -> int:
        return int(self.stream.handle)


Device = CudaPython | PyCuda
# In this order, because pycuda has no CUDA graphs. cuda.cudart is cuda-python before 12.8.
_KINDS: tuple[tuple[str, Callable[[Any, int], Device]], ...] = (
    ("cuda.bindings.runtime", CudaPython),
    ("cuda.cudart", CudaPython),
    ("pycuda.driver", PyCuda),
)
PACKAGES = ("cuda-bindings", "pycuda")  # the distributions that contain these modules


def open_device(ordinal: int = 0) -> Device:
    """Open the GPU with this CUDA ordinal.

    Raises:
        UnavailableError: there is no GPU, no driver, or no Python package for CUDA.
        BackendError: there are GPUs, but not so many.
    """
    if (problem := gpu_problem()) is not None:
        raise UnavailableError(problem)
    for module, kind in _KINDS:
        try:
            return kind(importlib.import_module(module), ordinal)
        except ImportError:  # missing, or for another version of CUDA
            continue
    raise UnavailableError(
        f"expected pycuda or cuda-python to reach the GPU, found neither; {cuda_hint()}"
    )


def _check_ordinal(ordinal: int, count: int) -> None:
    if not 0 <= ordinal < count:
        raise BackendError(f"GPU {ordinal}: expected a number from 0 to {count - 1}")


def _driver_version(cuda: int) -> str:
    """Return the driver's version, where NVML knows it, and that of CUDA (13000 is 13.0)."""
    driver = next((gpu.driver for gpu in query_gpus() if gpu.driver), None)
    return ", ".join(filter(None, (driver, f"CUDA {cuda // 1000}.{cuda % 1000 // 10}")))
