"""Engines that run a bundle's graph. Each lives in its own file and imports its own library."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capt_deploy.errors import BackendError

NAMES = ("auto", "onnxruntime")
# Of a bundle's graphs the one that a backend runs unless told otherwise: on the CPU lower precision
# is no faster, and bfloat16 has no kernels.
_PREFERRED = {"onnxruntime": ("fp32", "fp16", "int8")}


class Outputs(NamedTuple):
    """What a graph, or the model it was made from, says about some images; all float32."""

    logits: NDArray[np.float32]  # (images, classes), calibrated
    probabilities: NDArray[np.float32]  # (images, classes)
    embedding: NDArray[np.float32]  # (images, dim), unit norm


def joined(parts: Iterable[Outputs]) -> Outputs:
    """Return what was said of several batches, one behind the other."""
    return Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@runtime_checkable
class Backend(Protocol):
    """Runs one graph on one device."""

    name: str
    device: str

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255."""
        ...


def preferred_precision(name: str, available: Iterable[str]) -> str:
    """Return the precision, of those that a bundle holds, which suits a backend best."""
    own = _PREFERRED.get(name, _PREFERRED["onnxruntime"])
    there = list(available)
    return next((precision for precision in own if precision in there), there[0])


def create(name: str, onnx: bytes, precision: str, weights_folder: Path | None = None) -> Backend:
    """Start a backend by name; only `auto` may choose.

    Args:
        name: one of `NAMES`.
        onnx: the graph.
        precision: of the graph.
        weights_folder: where weights lie that are not in the graph's own file.

    Raises:
        BackendError: the name is unknown, or the backend cannot run this graph here.
    """
    if name not in NAMES:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    from capt_deploy.backends.onnxruntime import OnnxRuntime

    return OnnxRuntime(onnx, precision, weights_folder)
