"""One GPU: memory, streams, events and graphs. All calls of CUDA go through here.

Through NVIDIA's cuda-python where it is installed, else through pycuda. Both work in the primary
context of the GPU, as TensorRT does.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.tensorrt.device_cuda import CudaPython, PyCuda
from capt_deploy.core.errors import UnavailableError
from capt_deploy.core.gpus import gpu_problem

Bytes = NDArray[np.uint8]  # (bytes,)
# In this order, for pycuda has no CUDA graphs. cuda.cudart is cuda-python before 12.8.
_KINDS: tuple[tuple[str, Callable[[Any, int], "Device"]], ...] = (
    ("cuda.bindings.runtime", CudaPython),
    ("cuda.cudart", CudaPython),
    ("pycuda.driver", PyCuda),
)


class Device(Protocol):
    """One GPU. Everything below belongs inside `with device.active():`, in whichever thread."""

    ordinal: int
    name: str  # "NVIDIA GeForce RTX 4090"
    sm: int  # compute capability, 89 for 8.9
    driver: str  # "580.65.06", and the newest CUDA that it knows
    graphs: bool  # whether `capture` works

    def active(self) -> AbstractContextManager[None]:
        """Make it the GPU of this thread meanwhile."""
        ...

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        ...

    def pinned(self, size: int) -> Bytes:
        """Return host memory that the GPU reads and writes by itself."""
        ...

    def free_pinned(self, memory: Bytes) -> None:
        """Give back what `pinned` gave, which nobody may use any more."""
        ...

    def stream(self) -> Any:
        """Return a new stream; `int()` of it is its handle."""
        ...

    def free_stream(self, stream: Any) -> None:
        """Give back what `stream` gave."""
        ...

    def to_device(self, address: int, memory: Bytes, stream: Any) -> None:
        """Copy pinned memory to the GPU, when the stream gets there."""
        ...

    def to_host(self, memory: Bytes, address: int, stream: Any) -> None:
        """Fill pinned memory from the GPU, when the stream gets there."""
        ...

    def synchronize(self, stream: Any) -> None:
        """Wait for all that was put on a stream."""
        ...

    def record(self, stream: Any) -> Any:
        """Return a new event, which notes when the stream gets there."""
        ...

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Return the time between two events that have happened."""
        ...

    def free_event(self, event: Any) -> None:
        """Give back what `record` gave."""
        ...

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """Return as a graph what `work` puts on a stream; nothing of it is run."""
        ...

    def launch(self, graph: Any, stream: Any) -> None:
        """Put a graph on a stream."""
        ...

    def free_graph(self, graph: Any) -> None:
        """Give back what `capture` gave."""
        ...


def open_device(ordinal: int = 0) -> Device:
    """Return a GPU.

    Args:
        ordinal: CUDA's number of it.

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
        "expected pycuda or cuda-python to reach the GPU, found neither; pip install cuda-python"
    )
