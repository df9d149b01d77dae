"""ONNX Runtime on a GPU, by its CUDA provider."""

import ctypes
import io
import warnings
import weakref
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import DEFAULT_OPTIONS, Outputs, RuntimeOptions, check_timed, in_parts
from capt_deploy.backends.bound_session import BoundSession, Gpu
from capt_deploy.backends.choice import require
from capt_deploy.backends.onnxruntime import import_library, start_session
from capt_deploy.backends.probe import probe
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_name
from capt_deploy.core.process import Process

_PROVIDER = "CUDAExecutionProvider"
# The higher level fuses attention and LayerNorm; ENABLE_ALL adds layouts that only CPUs use. Some
# half-precision graphs load at the lower one alone, as on the CPU.
_LEVELS = {
    "fp32": ("ORT_ENABLE_EXTENDED", "ORT_ENABLE_BASIC"),
    "fp16": ("ORT_ENABLE_EXTENDED", "ORT_ENABLE_BASIC"),
}
_GRAPHS = {True: (True, False), False: (False,)}  # tried, by whether they are wanted
_ONLY_BASIC = ("ORT_ENABLE_BASIC",)


class OnnxRuntimeCuda:
    """A session on the CUDA provider. Thread-safe: runs wait for each other, as the GPU would."""

    name = "onnxruntime"

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Start a session and try it, with CUDA graphs if that works; else a warning says why.

        Args:
            onnx: the graph.
            precision: of the graph.
            weights_folder: where weights lie that are not in the graph's own file.
            options: which GPU, which batches, whether CUDA graphs.

        Raises:
            UnavailableError: driver, libraries or the provider are missing.
            BackendError: the graph cannot run here.
        """
        require("onnxruntime-cuda")
        self.device = f"cuda:{options.device} ({gpu_name(options.device)})"
        self._process, self._one_run = Process(), Lock()
        self._gpu = Gpu(options.device)
        self._free = weakref.finalize(self, _free, self._gpu, self._process)
        self._free.atexit = False  # the end of the process frees everything
        levels = _LEVELS.get(precision, _ONLY_BASIC)
        first = ""
        try:
            for graphs, level in product(_GRAPHS[options.cuda_graphs], levels):
                try:
                    self._try(onnx, level, weights_folder, options, graphs=graphs)
                    break
                except UnavailableError:
                    raise
                except BackendError as error:
                    first = first or str(error)
                self._gpu.release()  # only here: the error held on to the session
            else:
                raise BackendError(first)
        except BaseException:
            self._free()
            raise
        if first:
            how = f"{'with' if graphs else 'without'} CUDA graphs, {level}"
            warnings.warn(f"onnxruntime on {self.device} runs {how}: {first}", stacklevel=6)

    def _try(
        self,
        onnx: bytes,
        level: str,
        weights_folder: Path | None,
        options: RuntimeOptions,
        *,
        graphs: bool,
    ) -> None:
        session = self._start(onnx, level, weights_folder, graphs=graphs)
        bound = self._gpu.bind(session, options, graphs=graphs)
        probe("onnxruntime-cuda", bound.run, bound.pixels, options.batches)

    def _start(self, onnx: bytes, level: str, weights_folder: Path | None, *, graphs: bool) -> Any:
        settings = {
            "device_id": str(self._gpu.ordinal),
            "enable_cuda_graph": "1" if graphs else "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all, at each new batch
            "use_tf32": "0",  # float32 as the gate has seen it; who wants speed has fp16
            **self._gpu.settings,
        }
        _load_cuda_libraries()
        providers = ((_PROVIDER, settings), "CPUExecutionProvider")
        session = start_session(onnx, level, weights_folder, providers=providers)
        found = session.get_providers()
        if found[0] != _PROVIDER:
            raise UnavailableError(
                f"backend onnxruntime-cuda: expected {_PROVIDER}, found {', '.join(found)}: "
                f"{_missing_library()}"
            )
        return session

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255.

        Raises:
            BackendError: the backend is closed, came here by a fork, or the run fails.
        """
        self._process.check()
        with self._one_run:
            bound = self._open()
            return in_parts(bound.run, images, bound.largest)

    def time_on_device(self, images: NDArray[np.uint8], iterations: int) -> list[float]:
        """Return milliseconds of each run between events on the GPU, copies not included.

        ONNX Runtime waits for each replay of a CUDA graph: its launch by the host is in the time.

        Args:
            images: (batch, height, width, 3), at most the largest of `RuntimeOptions.batches`.
            iterations: how many runs.

        Raises:
            UnavailableError: there is neither pycuda nor cuda-python, which make events.
            BackendError: like `run`.
        """
        self._process.check()
        with self._one_run:
            bound = self._open()
            check_timed(images, bound.largest)
            buffers = bound.fill(images)
            bound.start(buffers)  # captures the graph of a batch that was not run yet
            return [self._gpu.time(lambda: bound.start(buffers)) for _ in range(iterations)]

    def close(self) -> None:
        """Free the GPU's memory once the run that is under way has ended."""
        if not self._process.is_this:
            return
        with self._one_run:
            self._free()

    def _open(self) -> BoundSession:
        if self._gpu.bound is None:
            raise BackendError("backend onnxruntime is closed; load the classifier again")
        return self._gpu.bound


def _free(gpu: Gpu, process: Process) -> None:
    if process.is_this:  # a forked copy holds nothing of the GPU's
        gpu.close()


def _load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where they are installed as such."""
    preload = getattr(import_library(), "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with redirect_stdout(io.StringIO()):  # it prints what it misses; see _missing_library
            preload()


def _missing_library() -> str:
    """Return what keeps the provider from loading, with the fix."""
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
