"""TensorRT and TensorRT-RTX, which have one interface, but for when kernels are compiled."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import (
    DEFAULT_OPTIONS,
    Outputs,
    RuntimeOptions,
    check_pixels,
    check_timed,
    in_parts,
)
from capt_deploy.backends.probe import probe
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.device import Device, open_device
from capt_deploy.backends.tensorrt.engine import LIBRARIES, load_library, make_logger, start_runtime
from capt_deploy.backends.tensorrt.execution import Execution, Layout, read_layout
from capt_deploy.backends.tensorrt.kernels import Kernels
from capt_deploy.backends.tensorrt.pool import Pool
from capt_deploy.backends.tensorrt.store import Target, key_of, obtain
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import Process, never_free_in_copies


class TensorRT:
    """An engine on one GPU. Thread-safe: a thread that runs it has an execution of its own."""

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
        *,
        library: str = "tensorrt",
    ) -> None:
        """Load the engine from the cache; build it where it is missing, which takes a while.

        Then try it, with CUDA graphs if that works; else a warning says why.

        Args:
            onnx: the graph.
            precision: of the graph.
            weights_folder: where weights lie that are not in the graph's own file.
            options: which GPU, which batches, where the cache is.
            library: `tensorrt` or `tensorrt_rtx`.

        Raises:
            UnavailableError: the library, a GPU that it knows, or a way to CUDA is missing.
            BackendError: the graph cannot run here.
        """
        trt = load_library(library)
        device = open_device(options.device)
        self._library, self.name = library, LIBRARIES[library]
        self.device = f"cuda:{device.ordinal} ({device.name})"
        self._process = Process()
        cache = EngineCache(options.cache_folder)
        graph = StoredGraph(onnx, precision, weights_folder)
        target = Target(device.sm, device.name, device.driver, device.active)
        key = key_of(graph, library, target, options.batches)
        with device.active():
            load = partial(_deserialise, start_runtime(library), library)
            engine = obtain(cache, key, graph, target, load)
            self._layout = read_layout(trt, engine, options.batches)
        rtx = library == "tensorrt_rtx"
        first: str | None = None
        for graphs in _tries(options.cuda_graphs, rtx or device.graphs):
            kernels = Kernels(trt, engine, device, cache, key, graphs) if rtx else None
            make = _maker(trt, engine, device, self._layout, kernels, graphs)
            try:
                self._start(Pool(device, make), kernels, options.batches)
                break
            except BackendError as error:
                if not graphs:
                    raise
                first = str(error)
        if first is not None:
            reason = f"{self.name} on {self.device} runs without CUDA graphs: {first}"
            warnings.warn(reason, stacklevel=6)

    def _start(self, pool: Pool, kernels: Kernels | None, batches: tuple[int, int, int]) -> None:
        """Try the executions of a pool.

        Raises:
            BackendError: they do not work; nothing of them is left.
        """
        self._pool = pool
        try:
            probe(self.name, self.run, self._layout.pixels, batches)
        except BaseException:
            pool.close()
            raise
        if kernels is not None:
            kernels.save()  # at once: a process that is killed says no goodbye
        self._finish = weakref.finalize(self, _finish, pool, kernels)
        # The end of the process frees everything, and threads may still run.
        self._finish.atexit = False

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255; any batch size; thread-safe.

        Raises:
            BackendError: it is closed, the pixels have another shape, or the GPU failed.
        """
        self._process.check()
        check_pixels(images, self._layout.pixels)
        if not len(images):
            empty = (np.zeros((0, size), np.float32) for size in self._layout.columns.values())
            return Outputs(*empty)
        with self._execution() as execution:
            return in_parts(execution.run, images, self._layout.largest)

    def time_on_device(self, images: NDArray[np.uint8], iterations: int) -> list[float]:
        """Return milliseconds of each run between events on the GPU, copies not included.

        Args:
            images: (batch, height, width, 3), at most the largest batch of the engine.
            iterations: how many runs; they are queued one behind the other.

        Raises:
            BackendError: like `run`, or the engine takes no such batch.
        """
        self._process.check()
        check_pixels(images, self._layout.pixels)
        check_timed(images, self._layout.largest)
        with self._execution() as execution:
            return execution.time(images, iterations)

    def close(self) -> None:
        """Free the GPU's memory once what is running has ended; a second call does nothing."""
        self._finish()

    @contextmanager
    def _execution(self) -> Iterator[Execution]:
        """Lend an execution; errors are said with the library's own reasons."""
        errors = make_logger(self._library).listen()
        try:
            with self._pool.execution() as own:
                yield own
        except BackendError as cause:
            text = "; ".join([str(cause), *errors()[-2:]])
            raise BackendError(f"backend {self.name}: {text}") from cause


def _tries(wanted: bool, possible: bool) -> tuple[bool, ...]:
    """Return whether to use CUDA graphs, first and then."""
    if wanted and not possible:
        say("tensorrt: pycuda has no CUDA graphs, which cuda-python has; doing without")
    return (True, False) if wanted and possible else (False,)


def _finish(pool: Pool, kernels: Kernels | None) -> None:
    pool.close()  # first, for nothing may run while kernels are saved
    if kernels is not None:
        kernels.save()


def _maker(
    trt: Any,
    engine: Any,
    device: Device,
    layout: Layout,
    kernels: Kernels | None,
    graphs: bool,
) -> Callable[[], Execution]:
    """Return what makes executions."""
    if kernels is not None:
        return partial(Execution, device, layout, kernels.context, 0, capture=False)
    # The contexts of one execution share its memory.
    context, scratch = partial(_context, trt, engine), engine.device_memory_size_v2
    return partial(Execution, device, layout, context, scratch, capture=graphs)


def _context(trt: Any, engine: Any, scratch: int) -> Any:
    """Return an execution context of TensorRT's that computes in the memory at an address."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = engine.create_execution_context(strategy)
    if context is not None:
        context.set_device_memory(scratch, engine.device_memory_size_v2)
    return context


def _deserialise(runtime: Any, library: str, data: bytes) -> Any:
    """Return an engine; None, and a line with the reason, if it is not one for this machine."""
    errors = make_logger(library).listen()
    engine = None
    with suppress(Exception):  # a foreign engine, in whichever way the library takes it
        engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        never_free_in_copies(runtime)
        never_free_in_copies(engine)
    elif reasons := errors():
        say(f"{library}: {reasons[-1]}")
    return engine
