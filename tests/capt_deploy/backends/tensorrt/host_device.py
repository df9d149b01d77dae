"""A device that is the host's own memory, and an engine that runs on it.

What surrounds the calls of CUDA and TensorRT is tested with them: splitting, filling up, copies,
threads, graphs. They are as strict as the real ones: memory has to be theirs and is counted, a
context computes for the shape it was given last, and a graph for the shape at its capture.
"""

import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

from capt_deploy.backends.base import Outputs
from capt_deploy.backends.tensorrt.execution import INPUT, Layout
from capt_deploy.core.errors import BackendError

PIXELS, COLUMNS = (4, 4, 3), {"logits": 3, "probabilities": 3, "embedding": 5}
LAYOUT = Layout(PIXELS, COLUMNS, (1, 2, 4, 8))


def answer(images):
    """Return what the engine says: numbers that tell every image and output from the others."""
    totals = images.astype(np.float32).sum(axis=(1, 2, 3))[:, None]
    return Outputs(
        *(totals * np.arange(1, size + 1, dtype=np.float32) for size in COLUMNS.values())
    )


class HostDevice:
    ordinal, name, sm, driver, graphs = 0, "the host", 89, "none", True

    def __init__(self, memory=2**30):
        self.left = memory
        self.held = {}  # by address or id
        self.launched = []
        self.captures = True
        self._current = threading.local()

    @contextmanager
    def active(self):
        before = getattr(self._current, "on", False)
        self._current.on = True
        try:
            yield
        finally:
            self._current.on = before

    def _check(self):
        assert getattr(self._current, "on", False), "called outside `with device.active()`"

    def allocate(self, size):
        self._check()
        if size > self.left:
            raise BackendError("CUDA: cudaMalloc failed: out of memory")
        self.left -= size
        memory = np.full(size, 0xAB, np.uint8)
        self.held[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address):
        self._check()
        self.left += self.held.pop(address).nbytes

    def pinned(self, size):
        memory = np.full(size, 0xCD, np.uint8)
        self.held[f"pinned {memory.ctypes.data}"] = memory
        return memory

    def free_pinned(self, memory):
        memory[:] = 0xEF  # whoever still looks at it notices
        del self.held[f"pinned {memory.ctypes.data}"]

    def stream(self):
        self._check()
        self.held["stream", id(self)] = self.held.get(("stream", id(self)), 0) + 1
        return 7

    def free_stream(self, stream):
        self.held["stream", id(self)] -= 1

    @property
    def leaks(self):
        return [name for name, memory in self.held.items() if not isinstance(memory, int) or memory]

    def to_device(self, address, memory, stream):
        self._check()
        self.held[address][: memory.nbytes] = memory

    def to_host(self, memory, address, stream):
        self._check()
        memory[:] = self.held[address][: memory.nbytes]

    def synchronize(self, stream):
        self._check()

    def record(self, stream):
        self.held[f"event {len(self.launched)}"] = 1
        return len(self.launched)

    def elapsed_ms(self, first, second):
        return float(second - first)

    def free_event(self, event):
        self.held.pop(f"event {event}", None)

    def run(self, work):
        """Do what a context enqueues, or keep it for a graph."""
        if (graph := getattr(self._current, "graph", None)) is not None:
            graph.append(work)
        else:
            work()

    def capture(self, work, stream):
        self._check()
        if not self.captures:
            raise BackendError("CUDA: cudaStreamEndCapture failed")
        self._current.graph = graph = []
        work()
        self._current.graph = None
        return graph

    def launch(self, graph, stream):
        self._check()
        self.launched.append(graph)
        for work in graph:
            work()

    def free_graph(self, graph):
        graph.clear()


class Context:
    def __init__(self, device, fails=False):
        self._device, self._addresses, self._batch, self._fails = device, {}, None, fails

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return address in self._device.held

    def set_input_shape(self, name, shape):
        assert (name, shape[1:]) == (INPUT, PIXELS)
        self._batch = shape[0]
        return shape[0] <= LAYOUT.largest

    def set_device_memory(self, address, size):
        assert self._device.held[address].nbytes >= size

    def execute_async_v3(self, stream):
        if self._fails:
            return False
        batch = self._batch
        self._device.run(lambda: self._compute(batch))
        return True

    def _compute(self, batch):
        size = batch * int(np.prod(PIXELS))
        images = self._device.held[self._addresses[INPUT]][:size].reshape(batch, *PIXELS)
        for name, values in answer(images)._asdict().items():
            data = np.ascontiguousarray(values).view(np.uint8).ravel()
            self._device.held[self._addresses[name]][: data.nbytes] = data


class Engine:
    """What a deserialised engine is asked."""

    device_memory_size_v2 = 64
    num_io_tensors = 1 + len(COLUMNS)

    def __init__(self, device):
        self._device = device
        self._names = [*COLUMNS, INPUT]  # engines have them in any order

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_shape(self, name):
        return (-1, *PIXELS) if name == INPUT else (-1, COLUMNS[name])

    def get_tensor_dtype(self, name):
        return np.uint8 if name == INPUT else np.float32

    def create_execution_context(self, strategy_or_config):
        assert strategy_or_config is not None
        return Context(self._device)

    def create_runtime_config(self):
        return RuntimeConfig()


class RuntimeConfig:
    """TensorRT-RTX's settings of an execution context."""

    cuda_graph_strategy = None

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class RuntimeCache:
    """The kernels that TensorRT-RTX has compiled."""

    def __init__(self):
        self.kernels = b""

    def deserialize(self, blob):
        self.kernels = bytes(blob)
        return True

    def serialize(self):
        return self.kernels + b"kernel "


def library(name, version, device):
    """Return a module that looks like TensorRT from the side that runs engines."""
    module = ModuleType(name)
    module.__version__ = version
    module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
    module.nptype = lambda kind: kind
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, data):
            if data == b"raises":
                raise RuntimeError("magic tag does not match")
            return Engine(device) if data == b"an engine" else None

    module.Runtime = Runtime
    return module
