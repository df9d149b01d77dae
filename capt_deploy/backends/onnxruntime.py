"""ONNX Runtime on the CPU."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.errors import BackendError


class OnnxRuntime:
    """A session on the CPU provider. Thread-safe: ONNX Runtime allows concurrent `run` calls."""

    name = "onnxruntime"
    device = "cpu"

    def __init__(self, onnx: bytes, precision: str) -> None:
        # ENABLE_ALL crashes the process on half-precision ViTs (onnxruntime 1.31 on CPU).
        level = "ORT_ENABLE_ALL" if precision == "fp32" else "ORT_ENABLE_EXTENDED"
        self._session = _session(onnx, level)

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255."""
        return Outputs(*self._session.run(list(Outputs._fields), {"images": images}))


def _session(onnx: bytes, level: str) -> Any:
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
        "session.model_external_initializers_file_folder_path", f"{os.devnull}/none"
    )
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # its exceptions share no base class but this
        raise BackendError(f"backend onnxruntime cannot load the graph: {cause}") from cause
