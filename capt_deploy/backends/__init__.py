"""Engines that run a bundle's graph. Each lives in its own file and imports its own library."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from capt_deploy.errors import BackendError

NAMES = ("auto", "onnxruntime")


class Outputs(NamedTuple):
    """What the graph says about a batch; all float32."""

    logits: NDArray[np.float32]  # (batch, classes), calibrated
    probabilities: NDArray[np.float32]  # (batch, classes)
    embedding: NDArray[np.float32]  # (batch, dim), unit norm


class Backend(Protocol):
    """Runs one graph on one device."""

    name: str
    device: str

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255."""
        ...


def create(name: str, onnx: bytes, precision: str) -> Backend:
    """Start a backend by name; only `auto` may choose.

    Raises:
        BackendError: the name is unknown, or the backend cannot run this graph here.
    """
    if name not in NAMES:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    from capt_deploy.backends.onnxruntime import OnnxRuntime

    return OnnxRuntime(onnx, precision)
