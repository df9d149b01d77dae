"""ONNX Runtime on a GPU, through its CUDA provider."""

import ctypes
import io
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from capt_deploy.backends.base import (
    Outputs,
    Pixels,
    check_pixels,
    check_timed,
    run_in_parts,
    try_out,
    typed_errors,
)
from capt_deploy.backends.device import Device, open_device
from capt_deploy.backends.onnxruntime import CUDA, import_library, start_session
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions, batch_buckets
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_name
from capt_deploy.core.process import Process

# EXTENDED fuses attention and LayerNorm; ENABLE_ALL adds layouts that only CPUs use. As on the CPU,
# some half-precision graphs load only at BASIC.
_FUSED = ("ORT_ENABLE_EXTENDED", "ORT_ENABLE_BASIC")
_LEVELS = {"fp32": _FUSED, "fp16": _FUSED}


class OnnxRuntimeCuda:
    """A session on the CUDA provider. Thread-safe: runs wait for each other, as the GPU would."""

    name = "onnxruntime"
    queued = False  # it waits for each replay of a CUDA graph

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Start a session and try it out; a warning says why if CUDA graphs do not work."""
        self.device = f"cuda:{options.device} ({gpu_name(options.device)})"
        self._process, self._one_run = Process(), Lock()
        self._bound = BoundSession(options.device)
        self._free = weakref.finalize(self, _free, self._bound, self._process)
        self._free.atexit = False  # the end of the process frees everything
        with_graphs = (True, False) if options.cuda_graphs else (False,)
        levels = _LEVELS.get(precision, ("ORT_ENABLE_BASIC",))
        first = ""
        try:
            for graphs, level in product(with_graphs, levels):
                try:
                    self._bound.attach(
                        self._start(onnx, level, weights_folder, graphs=graphs),
                        options.batches,
                        graphs=graphs,
                    )
                    try_out(self.name, self._bound.run, self._bound.pixels, options.batches)
                    break
                except UnavailableError:
                    raise
                except BackendError as error:
                    first = first or str(error)
                self._bound.release()  # not in the handler, whose traceback holds the session
            else:
                raise BackendError(first)
        except BaseException:
            self._free()
            raise
        if first:
            how = f"{'with' if graphs else 'without'} CUDA graphs, {level}"
            warnings.warn(f"onnxruntime on {self.device} runs {how}: {first}", stacklevel=6)

    def _start(self, onnx: bytes, level: str, weights_folder: Path | None, *, graphs: bool) -> Any:
        settings = {
            "device_id": str(self._bound.ordinal),
            "enable_cuda_graph": "1" if graphs else "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all, at each new batch size
            "use_tf32": "0",  # float32 as the gate has seen it; fp16 is there for speed
            **self._bound.settings,
        }
        preload = getattr(import_library(), "preload_dlls", None)  # since 1.21
        if preload is not None:  # loads CUDA and cuDNN from NVIDIA's Python packages
            with redirect_stdout(io.StringIO()):  # it prints what is missing; see _missing_library
                preload()
        providers = ((CUDA, settings), "CPUExecutionProvider")
        session = start_session(onnx, level, weights_folder, providers=providers)
        active = session.get_providers()
        if active[0] != CUDA:  # ONNX Runtime falls back without an error
            raise UnavailableError(
                f"backend onnxruntime-cuda: expected {CUDA}, found {', '.join(active)}: "
                f"{_missing_library()}"
            )
        return session

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; see `Backend.run`."""
        with self._one_at_a_time() as bound:
            return run_in_parts(bound.run, images, bound.largest)

    def time_on_device(self, images: Pixels, iterations: int) -> list[float]:
        """Return the milliseconds of each run on the GPU; see `DeviceTimed.time_on_device`."""
        with self._one_at_a_time() as bound:
            check_timed(images, bound.largest)
            return bound.time(images, iterations)

    def close(self) -> None:
        """Free the GPU's memory once the current run has ended."""
        if self._process.is_this:
            with self._one_run:
                self._free()

    @contextmanager
    def _one_at_a_time(self) -> Iterator["BoundSession"]:
        self._process.check()
        with self._one_run:
            if not self._free.alive:
                raise BackendError("backend onnxruntime is closed; load the classifier again")
            yield self._bound


def _free(bound: "BoundSession", process: Process) -> None:
    if process.is_this:  # a forked copy holds nothing on the GPU
        bound.close()


@dataclass(frozen=True)
class _Buffers:
    """The memory of one batch size."""

    staging: Pixels
    images: Any  # an OrtValue, as the outputs
    outputs: tuple[Any, ...]
    binding: Any
    run_options: Any


class BoundSession:
    """A session with fixed buffers for each batch bucket, and its stream. Not thread-safe.

    CUDA graphs replay with the addresses at which they were captured. A batch runs in the smallest
    bucket that holds it. Streams, events and pinned memory need a Python package for CUDA; without
    one the session runs on a stream of its own and cannot be timed.
    """

    kind = "cuda"  # ONNX Runtime's name of the memory that holds the buffers

    def __init__(self, ordinal: int) -> None:
        """Open the GPU and make a stream; `attach` a session next."""
        self.ordinal = ordinal
        self.settings: dict[str, str] = {}  # of the CUDA provider
        self._session: Any = None
        self._buffers: dict[int, _Buffers] = {}  # by batch size
        self._pinned: list[Any] = []
        self._device: Device | None = None
        try:
            self._device = open_device(ordinal)
        except UnavailableError as error:
            self._problem = str(error)
            return
        with self._device.active():
            self._stream = self._device.stream()
        self.settings = {"user_compute_stream": str(int(self._stream))}

    def attach(self, session: Any, batches: tuple[int, int, int], *, graphs: bool) -> None:
        """Take a session of a bundle's graph; `graphs` says whether it captures CUDA graphs."""
        self._session, self._graphs = session, graphs
        self._sizes = batch_buckets(*batches)
        self.largest = self._sizes[-1]
        (images,) = session.get_inputs()
        self.pixels = tuple(images.shape[1:])  # height, width, 3
        self._columns = {output.name: output.shape[1:] for output in session.get_outputs()}

    def run(self, images: Pixels) -> Outputs:
        """Run pixels of at most the largest batch; see `Backend.run`."""
        buffers = self._fill(images)
        self._start(buffers)
        with typed_errors("onnxruntime", "fetch its outputs"):
            buffers.binding.synchronize_outputs()
            # Copies, because the next run writes into the same buffers.
            return Outputs(*(np.array(value.numpy()[: len(images)]) for value in buffers.outputs))

    def time(self, images: Pixels, iterations: int) -> list[float]:
        """Return the milliseconds that each run takes on the stream."""
        if self._device is None:
            raise UnavailableError(self._problem)
        buffers = self._fill(images)
        self._start(buffers)  # captures the graph of a batch size that has not run yet
        with self._device.active():
            return [self._time(self._device, buffers) for _ in range(iterations)]

    def _time(self, device: Device, buffers: _Buffers) -> float:
        events = [device.record(self._stream)]
        try:
            self._start(buffers)
            events.append(device.record(self._stream))
            device.synchronize(self._stream)
            return device.elapsed_ms(*events)
        finally:
            for event in events:
                device.free_event(event)

    def _fill(self, images: Pixels) -> _Buffers:
        """Copy images into the buffers of their bucket."""
        check_pixels(images, self.pixels)
        size = next(size for size in self._sizes if size >= len(images))
        with typed_errors("onnxruntime", f"take {size} images"):
            if size not in self._buffers:
                self._buffers[size] = self._make_buffers(size)
            buffers = self._buffers[size]
            buffers.staging[: len(images)] = images
            buffers.images.update_inplace(buffers.staging)
        return buffers

    def _start(self, buffers: _Buffers) -> None:
        with typed_errors("onnxruntime", "run the graph"):
            self._session.run_with_iobinding(buffers.binding, buffers.run_options)

    def _make_buffers(self, size: int) -> _Buffers:
        from onnxruntime import OrtValue, RunOptions

        def value(shape: tuple[int, ...], element: Any) -> Any:
            return OrtValue.ortvalue_from_shape_and_type(shape, element, self.kind, self.ordinal)

        shape = (size, *self.pixels)
        images = value(shape, np.uint8)
        outputs = tuple(value((size, *self._columns[n]), np.float32) for n in Outputs._fields)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", images)
        for name, output in zip(Outputs._fields, outputs, strict=True):
            binding.bind_ortvalue_output(name, output)
        run_options = RunOptions()
        # Each batch size is captured into a graph of its own; -1 stands for no graph.
        number = self._sizes.index(size) + 1 if self._graphs else -1
        run_options.add_run_config_entry("gpu_graph_id", str(number))
        return _Buffers(self._make_staging(shape), images, outputs, binding, run_options)

    def _make_staging(self, shape: tuple[int, ...]) -> Pixels:
        """Return zeroed host memory, which the GPU reads by itself where that is possible."""
        with self._active() as device:
            if device is None:
                return np.zeros(shape, np.uint8)
            memory = device.pinned(int(np.prod(shape)))
        self._pinned.append(memory)
        memory[:] = 0
        return memory.reshape(shape)

    def release(self) -> None:
        """Free the session and its buffers, which no thread may use any more."""
        with self._active() as device:
            if device is not None:
                with suppress(BackendError):  # after a failure even waiting may fail
                    device.synchronize(self._stream)  # it may still use the buffers
            self._session, self._buffers = None, {}
            while self._pinned and device is not None:
                with suppress(BackendError):
                    device.free_pinned(self._pinned.pop())

    def close(self) -> None:
        """Free everything: the stream last, because the session ends on it."""
        self.release()
        with self._active() as device, suppress(BackendError):
            if device is not None:
                device.free_stream(self._stream)

    @contextmanager
    def _active(self) -> Iterator[Device | None]:
        with self._device.active() if self._device else nullcontext():
            yield self._device


def _missing_library() -> str:
    """Return the reason why the provider does not load, with the fix."""
    library = Path(import_library().__file__).parent / "capi/libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as cause:
        reason = str(cause)
    else:
        reason = "its libraries load, but it does not start"
    return (
        f"{reason}; pip install 'onnxruntime-gpu[cuda,cudnn]', or install CUDA and cuDNN of the "
        f"versions that this onnxruntime-gpu needs"
    )
