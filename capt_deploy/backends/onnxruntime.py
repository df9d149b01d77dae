"""ONNX Runtime on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.errors import BackendError, UnavailableError

# onnxruntime 1.31 on the CPU: ENABLE_ALL crashes the process on half-precision ViTs, and
# ENABLE_EXTENDED cannot load a half-precision FastViT; neither is faster there than BASIC. What
# emulates bfloat16 must not have its roundings optimised away.
_LEVELS = {"fp32": "ORT_ENABLE_ALL", "emulated": "ORT_DISABLE_ALL"}


class OnnxRuntime:
    """A session on the CPU provider. Thread-safe: ONNX Runtime allows concurrent `run` calls."""

    name = "onnxruntime"
    device = "cpu"

    def __init__(
        self,
        onnx: bytes | Path,
        precision: str,
        weights_folder: Path | None = None,
        *,
        frugal: bool = False,
    ) -> None:
        """Start a session.

        Args:
            onnx: the graph, or its file, which then must be one that nobody else can change.
            precision: of the graph.
            weights_folder: where weights lie that are not in the graph's own file.
            frugal: give memory back after every run, which costs time.

        Raises:
            BackendError: the graph cannot run here.
        """
        if precision == "bf16":
            raise UnavailableError(
                "backend onnxruntime: has no bfloat16 kernels on the CPU; run this graph on a GPU, "
                "or export with --fp16 or --fp32 as well"
            )
        level = _LEVELS.get(precision, "ORT_ENABLE_BASIC")
        self._session = start_session(onnx, level, weights_folder, frugal=frugal)

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255."""
        return Outputs(*self._session.run(list(Outputs._fields), {"images": images}))


def start_session(
    onnx: bytes | Path,
    level: str,
    weights_folder: Path | None = None,
    *,
    frugal: bool = False,
) -> Any:
    """Return an `InferenceSession` on the CPU provider.

    Args:
        onnx: the graph, or its file, which then must be one that nobody else can change.
        level: the name of a `GraphOptimizationLevel`.
        weights_folder: where weights lie that are not in the graph's own file.
        frugal: give memory back after every run, which costs time.

    Raises:
        BackendError: ONNX Runtime is missing, or cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError as cause:
        raise BackendError(
            "backend onnxruntime: the package is missing; pip install onnxruntime"
        ) from cause
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors reach the user as exceptions
    # A graph in memory may name weights in other files, which would be sought in the current
    # folder: whatever lies there is none of a bundle's business.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(weights_folder or f"{os.devnull}/none"),
    )
    options.enable_cpu_mem_arena = not frugal
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # its exceptions share no base class but this
        raise BackendError(f"backend onnxruntime cannot load the graph: {cause}") from cause
