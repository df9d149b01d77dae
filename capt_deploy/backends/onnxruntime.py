"""ONNX Runtime on the CPU."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import DEFAULT_OPTIONS, Outputs, RuntimeOptions, in_parts
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.process import Process, never_free_in_copies

# onnxruntime 1.31 on the CPU: ENABLE_ALL crashes the process on half-precision ViTs, and
# ENABLE_EXTENDED cannot load a half-precision FastViT; neither is faster there than BASIC. What
# emulates bfloat16 must not have its roundings optimised away.
_LEVELS = {"fp32": "ORT_ENABLE_ALL", "emulated": "ORT_DISABLE_ALL"}
CPU = ("CPUExecutionProvider",)
Provider = str | tuple[str, dict[str, str]]


class OnnxRuntime:
    """A session on the CPU provider. Thread-safe: ONNX Runtime allows concurrent `run` calls."""

    name = "onnxruntime"
    device = "cpu"

    def __init__(
        self,
        onnx: bytes | Path,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
        *,
        frugal: bool = False,
    ) -> None:
        """Start a session.

        Args:
            onnx: the graph, or its file, which then must be one that nobody else can change.
            precision: of the graph.
            weights_folder: where weights lie that are not in the graph's own file.
            options: `threads` and the largest of `batches` count.
            frugal: give memory back after every run, which costs time.

        Raises:
            BackendError: the graph cannot run here.
        """
        if precision == "bf16":
            raise UnavailableError(
                "backend onnxruntime: has no bfloat16 kernels on the CPU; run this graph on a GPU, "
                "or export with --fp16 or --fp32 as well"
            )
        self._process = Process()
        self._largest = options.batches[-1]
        level = _LEVELS.get(precision, "ORT_ENABLE_BASIC")
        self._session: Any = start_session(
            onnx, level, weights_folder, frugal=frugal, threads=options.threads
        )

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255.

        Raises:
            BackendError: the backend is closed, came here by a fork, or the run fails.
        """
        self._process.check()
        session = self._session
        if session is None:
            raise BackendError("backend onnxruntime is closed; load the classifier again")
        return in_parts(lambda part: _run(session, part), images, self._largest)

    def close(self) -> None:
        """Free the session once the runs that are under way have ended."""
        if self._process.is_this:
            self._session = None


def import_library() -> Any:
    """Return the module `onnxruntime`.

    From 1.29 on it reports its use to its maker, unless the environment says otherwise before it
    is loaded. What a classifier sees is nobody else's business; and the threads that report make
    forked copies of a process hang when they exit.

    Raises:
        UnavailableError: it is missing.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as cause:
        raise UnavailableError(
            f"backend onnxruntime: the package is missing or does not load ({cause}); "
            f"pip install onnxruntime"
        ) from cause
    return onnxruntime


def _run(session: Any, images: NDArray[np.uint8]) -> Outputs:
    try:
        return Outputs(*session.run(list(Outputs._fields), {"images": images}))
    except Exception as cause:  # its exceptions share no base class but this
        raise BackendError(f"backend onnxruntime cannot run the graph: {cause}") from cause


def start_session(
    onnx: bytes | Path,
    level: str,
    weights_folder: Path | None = None,
    *,
    frugal: bool = False,
    threads: int | None = None,
    providers: Sequence[Provider] = CPU,
) -> Any:
    """Return an `InferenceSession`.

    Args:
        onnx: the graph, or its file, which then must be one that nobody else can change.
        level: the name of a `GraphOptimizationLevel`.
        weights_folder: where weights lie that are not in the graph's own file.
        frugal: give memory back after every run, which costs time.
        threads: that compute on the CPU; None for as many as this process has cores.
        providers: ONNX Runtime's own list of them, the first choice first.

    Raises:
        BackendError: ONNX Runtime is missing, or cannot load the graph.
    """
    onnxruntime = import_library()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors reach the user as exceptions
    # A graph in memory may name weights in other files, which would be sought in the current
    # folder: whatever lies there is none of a bundle's business.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(weights_folder or f"{os.devnull}/none"),
    )
    options.enable_cpu_mem_arena = not frugal
    # Its own default is all cores of the machine, also where a container may use two of them.
    options.intra_op_num_threads = threads or usable_cores()
    # Threads that spin on after a run take the cores away from those that decode the next images;
    # within a run spinning shortens the wait between its operators.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    try:
        session = onnxruntime.InferenceSession(
            onnx, options, providers=list(providers), enable_fallback=0
        )
    except Exception as cause:  # its exceptions share no base class but this
        raise BackendError(f"backend onnxruntime cannot load the graph: {cause}") from cause
    never_free_in_copies(session)
    session._model_bytes = None  # it keeps the whole file for a fallback that is switched off
    return session
