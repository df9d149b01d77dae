"""ONNX Runtime on the CPU, and what its two backends share."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from capt_deploy.backends.base import Outputs, Pixels, run_in_parts, typed_errors
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.backends.spec import BackendSpec
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.jetson import jetson_linux
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.process import Process, never_free_in_copies

# onnxruntime 1.31 on the CPU: ENABLE_ALL crashes the process on half-precision ViTs, and
# ENABLE_EXTENDED cannot load a half-precision FastViT; neither is faster there than BASIC. A graph
# that emulates bfloat16 must keep its roundings, which optimisation would remove.
_LEVELS = {
    "fp32": "ORT_ENABLE_ALL",
    "int8-cpu": "ORT_ENABLE_ALL",
    "emulated": "ORT_DISABLE_ALL",
}
CPU = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"
Provider = str | tuple[str, dict[str, str]]


class OnnxRuntime:
    """A session on the CPU. Thread-safe: ONNX Runtime allows concurrent `run` calls."""

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
        """Start a session; `threads` and the largest of `batches` count of the options.

        Args:
            onnx: the graph, or a file that nobody else can change.
            precision: of the graph; "emulated" for one that emulates bfloat16.
            weights_folder: folder of weights that are not in the graph's own file.
            options: how to use the machine.
            frugal: give memory back after every run, which is slower.

        Raises:
            UnavailableError: the precision has no kernels on the CPU.
            BackendError: the graph cannot be loaded.
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

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; see `Backend.run`."""
        self._process.check()
        session = self._session
        if session is None:
            raise BackendError("backend onnxruntime is closed; load the classifier again")

        def run_part(part: Pixels) -> Outputs:
            with typed_errors("onnxruntime", "run the graph"):
                return Outputs(*session.run(list(Outputs._fields), {"images": part}))

        return run_in_parts(run_part, images, self._largest)

    def close(self) -> None:
        """Free the session once the current runs have ended."""
        if self._process.is_this:
            self._session = None


def import_library() -> Any:
    """Import `onnxruntime` with its telemetry switched off, unless the environment asks for it.

    Since 1.29 it reports its use to its maker. What a classifier sees is private,
    and the reporting threads make forked copies of a process hang at their end.

    Raises:
        UnavailableError: it is not installed or does not load.
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


def start_session(
    onnx: bytes | Path,
    level: str,
    weights_folder: Path | None = None,
    *,
    frugal: bool = False,
    threads: int | None = None,
    providers: Sequence[Provider] = CPU,
) -> Any:
    """Start an `InferenceSession`.

    Args:
        onnx: the graph, or a file that nobody else can change.
        level: name of a `GraphOptimizationLevel`.
        weights_folder: folder of weights that are not in the graph's own file.
        frugal: give memory back after every run, which is slower.
        threads: number of CPU threads; None for as many as this process has cores.
        providers: execution providers in order of preference.

    Raises:
        UnavailableError: ONNX Runtime is not installed.
        BackendError: ONNX Runtime cannot load the graph.
    """
    onnxruntime = import_library()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors reach the user as exceptions
    # Without this, external weights of a graph in memory would be read from the current folder,
    # where files have nothing to do with the bundle.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(weights_folder or f"{os.devnull}/none"),
    )
    options.enable_cpu_mem_arena = not frugal
    # The default is all cores of the machine, even where a container may use only two of them.
    options.intra_op_num_threads = threads or usable_cores()
    # Threads that keep spinning after a run take cores from the decoding of the next images;
    # spinning within a run shortens the wait between operators.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    with typed_errors("onnxruntime", "load the graph"):
        session = onnxruntime.InferenceSession(
            onnx, options, providers=list(providers), enable_fallback=0
        )
    never_free_in_copies(session)
    session._model_bytes = None  # it keeps the whole file for a fallback that is switched off
    return session


def cuda_provider_problem() -> str | None:
    """Return why this ONNX Runtime has no CUDA provider, with the fix; None if it has one."""
    try:
        providers = import_library().get_available_providers()
    except UnavailableError as error:
        return str(error)
    if CUDA in providers:
        return None
    return (
        f"expected {CUDA}, found {', '.join(providers)}: this package is for the CPU only; "
        f"pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def advise(spec: BackendSpec, installed: Mapping[str, str], sms: Collection[int]) -> str | None:
    """Return the fix for packages that clash, or that lack CUDA; see `BackendSpec.fix`."""
    if installed.keys() >= {*spec.packages}:  # they overwrite each other's files
        names = " ".join(sorted(spec.packages))
        return f"pip uninstall -y {names}; pip install --no-cache-dir onnxruntime-gpu"
    if not spec.needs_gpu:
        return None
    if jetson_linux() is not None:
        return "pip has onnxruntime for the CPU of a Jetson alone: use the backend tensorrt"
    if "onnxruntime-gpu" in installed:  # then CUDA's own libraries are missing, or too old
        return "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"
    return "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
