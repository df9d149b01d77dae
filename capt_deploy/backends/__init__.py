"""Engines that run a bundle's graph. Each lives in its own file and imports its own library."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.batch_sizes import BATCHES, check_batches
from capt_deploy.core.errors import BackendError, ConfigError

# From the fastest on: what `auto` tries, and `onnxruntime` its own two of them.
AUTO = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu")
NAMES = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-cuda", "onnxruntime-cpu")
# Of a bundle's graphs the one that a backend runs unless told otherwise: on the CPU lower precision
# is no faster, and bfloat16 has no kernels; on GPUs half precision is, and loses nothing.
_ON_CPU = ("fp32", "fp16", "int8")
_ON_GPU = ("fp16", "bf16", "fp32", "int8")
_PREFERRED = {
    "tensorrt": _ON_GPU,
    "tensorrt-rtx": _ON_GPU,
    "onnxruntime-cuda": ("fp16", "fp32", "bf16", "int8"),
}


class Outputs(NamedTuple):
    """What a graph, or the model it was made from, says about some images; all float32."""

    logits: NDArray[np.float32]  # (images, classes), calibrated
    probabilities: NDArray[np.float32]  # (images, classes)
    embedding: NDArray[np.float32]  # (images, dim), unit norm


def joined(parts: Iterable[Outputs]) -> Outputs:
    """Return what was said of several batches, one behind the other."""
    return Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def in_parts(
    run: Callable[[NDArray[np.uint8]], Outputs], images: NDArray[np.uint8], largest: int
) -> Outputs:
    """Return what `run` says of images, of which it takes up to `largest` at once."""
    if len(images) <= largest:
        return run(images)
    return joined(run(images[at : at + largest]) for at in range(0, len(images), largest))


def check_pixels(images: NDArray[np.uint8], pixels: tuple[int, ...]) -> None:
    """Check what a backend with fixed buffers is given.

    Args:
        images: (batch, height, width, 3).
        pixels: the height, width, 3 that it takes.

    Raises:
        BackendError: they have another shape or type.
    """
    if images.dtype != np.uint8 or images.shape[1:] != pixels:
        raise BackendError(
            f"expected uint8 pixels (batch, {', '.join(map(str, pixels))}), came "
            f"{images.dtype} {images.shape}"
        )


def check_timed(images: NDArray[np.uint8], largest: int) -> None:
    """Check what is to be timed.

    Raises:
        BackendError: there are no images, or more than run at once.
    """
    if not 1 <= len(images) <= largest:
        raise BackendError(f"expected 1 to {largest} images to time at once, came {len(images)}")


@dataclass(frozen=True)
class RuntimeOptions:
    """How a backend uses the machine; each takes what concerns it."""

    device: int = 0  # CUDA ordinal
    threads: int | None = None  # of the CPU backend; None: the cores that this process may use
    batches: tuple[int, int, int] = BATCHES  # smallest, usual, largest batch run at once
    cuda_graphs: bool = True  # one per batch bucket
    cache_folder: Path | None = None  # of engines; None: the user's cache folder

    def __post_init__(self) -> None:
        if self.device < 0:
            raise ConfigError(f"device: expected the number of a GPU from 0 on, came {self.device}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, came {self.threads}")
        check_batches(self.batches, ConfigError)


DEFAULT_OPTIONS = RuntimeOptions()


@runtime_checkable
class Backend(Protocol):
    """Runs one graph on one device."""

    name: str  # "tensorrt", "tensorrt-rtx", "onnxruntime"
    device: str  # "cpu", "cuda:0 (NVIDIA H100 80GB HBM3)"

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, RGB, 0-255; any batch size; thread-safe."""
        ...

    def close(self) -> None:
        """Free what it holds; a second call does nothing."""
        ...


@runtime_checkable
class DeviceTimed(Protocol):
    """What backends on GPUs can do besides."""

    def time_on_device(self, images: NDArray[np.uint8], iterations: int) -> list[float]:
        """Return milliseconds of each run between events on the GPU, copies not included."""
        ...


def preferred_precision(name: str, available: Iterable[str]) -> str:
    """Return the precision, of those that a bundle holds, which suits a backend best."""
    there = list(available)
    return next((own for own in _PREFERRED.get(name, _ON_CPU) if own in there), there[0])


def candidates(name: str) -> tuple[str, ...]:
    """Return the backends that a name stands for, the fastest first.

    Raises:
        BackendError: the name is unknown.
    """
    if name not in NAMES:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    if name == "auto":
        return AUTO
    if name == "onnxruntime":
        return AUTO[-2:]
    return (name,)


def create(
    name: str,
    onnx: bytes,
    precision: str,
    weights_folder: Path | None = None,
    options: RuntimeOptions = DEFAULT_OPTIONS,
) -> Backend:
    """Start a backend by name; only `auto` and `onnxruntime` may choose.

    Args:
        name: one of `NAMES`.
        onnx: the graph.
        precision: of the graph.
        weights_folder: where weights lie that are not in the graph's own file.
        options: how to use the machine.

    Raises:
        BackendError: the name is unknown, or the backend cannot run this graph here.
    """
    from capt_deploy.backends.choice import first_that_works

    backend, _ = first_that_works(
        candidates(name), lambda own: start(own, onnx, precision, weights_folder, options)
    )
    return backend


def start(
    name: str,
    onnx: bytes,
    precision: str,
    weights_folder: Path | None = None,
    options: RuntimeOptions = DEFAULT_OPTIONS,
) -> Backend:
    """Start exactly the backend of this name, one of `AUTO`; else like `create`."""
    if name.startswith("tensorrt"):
        from capt_deploy.backends.tensorrt.backend import TensorRT

        library = name.replace("-", "_")
        return TensorRT(onnx, precision, weights_folder, options, library=library)
    if name == "onnxruntime-cuda":
        from capt_deploy.backends.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda(onnx, precision, weights_folder, options)
    from capt_deploy.backends.onnxruntime import OnnxRuntime

    return OnnxRuntime(onnx, precision, weights_folder, options)
