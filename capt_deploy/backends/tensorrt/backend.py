"""TensorRT and TensorRT-RTX: the same interface, but RTX compiles kernels when it loads."""

import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from capt_deploy.backends.base import (
    Outputs,
    Pixels,
    check_pixels,
    check_timed,
    run_in_parts,
    try_out,
)
from capt_deploy.backends.device import PACKAGES, Device, open_device
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.backends.spec import TENSORRT, TENSORRT_RTX, BackendSpec
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import load_library, make_logger, start_runtime
from capt_deploy.backends.tensorrt.execution import Execution, ExecutionPool, read_layout
from capt_deploy.backends.tensorrt.key import EngineKey
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.jetson import cuda_hint, jetson_linux
from capt_deploy.core.process import Process, never_free_in_copies

_SMS_WITHOUT_RTX = {87, 90, 100, 101, 103, 110}  # of data centres and Jetsons


class _Contexts:
    """Execution contexts of TensorRT, which compute in memory that they are given."""

    captured = True  # CUDA graphs are captured here

    def __init__(
        self, engine: Any, device: Device, cache: EngineCache, key: EngineKey, graphs: bool
    ) -> None:
        self._engine = engine
        self.scratch = engine.device_memory_size_v2  # bytes; contexts of one execution share them

    def make(self, scratch: int) -> Any:
        """Return a context that computes in the memory at the address `scratch`; None if full."""
        strategy = load_library(TENSORRT).ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is not None:
            context.set_device_memory(scratch, self.scratch)
        return context

    def save(self) -> None:
        """Do nothing: the engine is complete."""


class _CompilingContexts(_Contexts):
    """Execution contexts of TensorRT-RTX, which compile kernels that are kept in the cache."""

    captured = False  # it makes CUDA graphs by itself, because it replaces kernels while it runs

    def __init__(
        self, engine: Any, device: Device, cache: EngineCache, key: EngineKey, graphs: bool
    ) -> None:
        self._engine, self._device, self._cache = engine, device, cache
        self.scratch = 0  # each context has its own memory
        self._key = replace(key, kind="runtime", gpu=device.name, driver=device.driver)
        with device.active():
            self._config = engine.create_runtime_config()
            self._kernels = self._config.create_runtime_cache()
            for value in (self._config, self._kernels):
                never_free_in_copies(value)
            self._saved = cache.read(self._key)
            if self._saved is not None:
                self._kernels.deserialize(self._saved)  # ignores those of another machine
            self._config.set_runtime_cache(self._kernels)
        if graphs and hasattr(self._config, "cuda_graph_strategy"):  # since 1.2
            strategies = load_library(TENSORRT_RTX).CudaGraphStrategy
            self._config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE

    def make(self, scratch: int) -> Any:
        """Return a context; None if the GPU's memory is full."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Keep the kernels for the next start, if possible; nothing may run meanwhile."""
        with suppress(Exception), self._device.active():  # without them the next start is slower
            kernels = self._kernels.serialize()  # None if the library cannot do it
            if kernels is not None and (data := bytes(kernels)) and data != self._saved:
                self._cache.write(self._key, data)
                self._saved = data


class TensorRT:
    """An engine on one GPU. Thread-safe: each thread that runs it has an execution of its own."""

    spec = TENSORRT
    queued = True
    _contexts: type[_Contexts] = _Contexts

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Load the engine from the cache, or build it, which takes a while; then try it out.

        A warning says why if CUDA graphs do not work.
        """
        load_library(self.spec)
        device = open_device(options.device)
        self.name = self.spec.name
        self.device = f"cuda:{device.ordinal} ({device.name})"
        self._process = Process()
        cache = EngineCache(options.cache_folder)
        graph = StoredGraph(onnx, precision, weights_folder)
        request = EngineRequest(graph, self.spec, device.sm, options.batches, device)
        with device.active():
            load = partial(_deserialise, start_runtime(self.spec), self.spec)
            engine = request.find_portable(cache, load)
            if engine is None:
                engine = request.obtain(cache, load)
            self._layout = read_layout(engine, options.batches)
        problem = ""
        for graphs in self._graph_attempts(device, options.cuda_graphs):
            contexts = self._contexts(engine, device, cache, request.key, graphs)
            capture = graphs and contexts.captured
            make = partial(
                Execution, device, self._layout, contexts.make, contexts.scratch, capture=capture
            )
            try:
                self._start(ExecutionPool(device, make), contexts, options.batches)
                break
            except BackendError as error:
                if not graphs:
                    raise
                problem = str(error)
        if problem:
            text = f"{self.name} on {self.device} runs without CUDA graphs: {problem}"
            warnings.warn(text, stacklevel=6)

    def _graph_attempts(self, device: Device, requested: bool) -> tuple[bool, ...]:
        """Return whether to use CUDA graphs, in the order to try."""
        possible = device.graphs or not self._contexts.captured
        if requested and not possible:
            say(f"{self.name}: runs without CUDA graphs, which need cuda-python, not pycuda")
        return (True, False) if requested and possible else (False,)

    def _start(
        self, pool: ExecutionPool, contexts: _Contexts, batches: tuple[int, int, int]
    ) -> None:
        """Try out a pool; close it if it does not work."""
        self._pool = pool
        try:
            try_out(self.name, self.run, self._layout.pixels, batches)
        except BaseException:
            pool.close()
            raise
        contexts.save()  # at once: a process that is killed cannot do it at its end
        self._finish = weakref.finalize(self, _finish, pool, contexts, self._process)
        # The end of the process frees everything, and threads may still run.
        self._finish.atexit = False

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; see `Backend.run`."""
        self._process.check()
        check_pixels(images, self._layout.pixels)
        if not len(images):
            return Outputs(*(np.zeros((0, n), np.float32) for n in self._layout.columns.values()))
        with self._execution() as execution:
            return run_in_parts(execution.run, images, self._layout.largest)

    def time_on_device(self, images: Pixels, iterations: int) -> list[float]:
        """Return the milliseconds of each run on the GPU; see `DeviceTimed.time_on_device`."""
        self._process.check()
        check_pixels(images, self._layout.pixels)
        check_timed(images, self._layout.largest)
        with self._execution() as execution:
            return execution.time(images, iterations)

    def close(self) -> None:
        """Free the GPU's memory once the current runs have ended; a second call does nothing."""
        self._finish()

    @contextmanager
    def _execution(self) -> Iterator[Execution]:
        """Lend an execution; add the library's own reasons to its errors."""
        errors = make_logger(self.spec).listen()
        try:
            with self._pool.execution() as execution:
                yield execution
        except BackendError as cause:
            text = "; ".join([str(cause), *errors()[-2:]])
            raise BackendError(f"backend {self.name}: {text}") from cause


class TensorRTRTX(TensorRT):
    """TensorRT-RTX, whose engines are portable and finished on the GPU that loads them."""

    spec = TENSORRT_RTX
    _contexts = _CompilingContexts


def advise(spec: BackendSpec, installed: Mapping[str, str], sms: Collection[int]) -> str | None:
    """Return the fix for a GPU without RTX, or no way to CUDA; see `BackendSpec.fix`."""
    if spec is TENSORRT_RTX and sms and {*sms} <= _SMS_WITHOUT_RTX:
        return f"TensorRT-RTX is not made for this GPU: {TENSORRT.install}"
    has_library, has_cuda = ({*names} & installed.keys() for names in (spec.packages, PACKAGES))
    if spec is TENSORRT and jetson_linux() is not None:  # JetPack's own, which pip must not replace
        if find_spec(spec.module) is None:
            return spec.install
        return "sudo apt-get install --reinstall python3-libnvinfer" if has_cuda else cuda_hint()
    return cuda_hint() if has_library and not has_cuda else None


def _finish(pool: ExecutionPool, contexts: _Contexts, process: Process) -> None:
    if process.is_this:  # a forked copy holds nothing on the GPU
        pool.close()  # first, because nothing may run while kernels are saved
        contexts.save()


def _deserialise(runtime: Any, spec: BackendSpec, data: bytes, with_code: bool = False) -> Any:
    """Return an engine; None, and a line with the reason, if it is not one for this machine.

    Args:
        runtime: see `start_runtime`.
        spec: the backend.
        data: the serialised engine.
        with_code: whether the engine brings the runtime of its version, which is then executed.
    """
    if with_code or getattr(runtime, "engine_host_code_allowed", False):
        runtime.engine_host_code_allowed = with_code
    errors = make_logger(spec).listen()
    engine = None
    with suppress(Exception):  # the library rejects a foreign engine in various ways
        engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        never_free_in_copies(runtime)
        never_free_in_copies(engine)
    elif reasons := errors():
        say(f"{spec.name}: {reasons[-1]}")
    return engine
