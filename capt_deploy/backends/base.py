"""The interface of a backend, and the checks that backends share."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import BackendError

Pixels = NDArray[np.uint8]  # (batch, height, width, 3), RGB, 0-255


class Outputs(NamedTuple):
    """The outputs of a graph, or of the model that it was made from; all float32."""

    logits: NDArray[np.float32]  # (batch, classes), calibrated
    probabilities: NDArray[np.float32]  # (batch, classes)
    embedding: NDArray[np.float32]  # (batch, dim), unit norm


@runtime_checkable
class Backend(Protocol):
    """One graph on one device, ready to run.

    The constructor takes the ONNX graph as bytes, its precision, the folder of weights that are
    not in the graph's own file (or None), and `RuntimeOptions`. It raises `UnavailableError` where
    this machine cannot run it whatever the graph, and `BackendError` where it cannot run the graph.
    """

    name: str  # "tensorrt", "tensorrt-rtx", "onnxruntime"
    device: str  # "cpu", "cuda:0 (NVIDIA H100 80GB HBM3)"

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; any batch size; thread-safe.

        Raises:
            BackendError: the backend is closed, this is a forked copy of its process, the pixels
                have another shape, or the run fails.
        """
        ...

    def close(self) -> None:
        """Free memory and threads once the current runs have ended; a second call does nothing."""
        ...


@runtime_checkable
class DeviceTimed(Protocol):
    """A backend that measures its runs by the GPU's own clock."""

    queued: bool  # whether timed runs wait in a queue; else each one includes its launch

    def time_on_device(self, images: Pixels, iterations: int) -> list[float]:
        """Return the milliseconds of each run between events on the GPU, without copies.

        Args:
            images: at most the largest of `RuntimeOptions.batches`.
            iterations: number of runs.

        Raises:
            UnavailableError: no Python package for CUDA is installed.
            BackendError: as `Backend.run`, or there are too many images.
        """
        ...


@contextmanager
def typed_errors(backend: str, action: str) -> Iterator[None]:
    """Raise what a library raises as a `BackendError`: its backend "cannot" do the `action`."""
    try:
        yield
    except Exception as cause:  # libraries' exceptions share no other base class
        raise BackendError(f"backend {backend} cannot {action}: {cause}") from cause


def concatenate(parts: Iterable[Outputs]) -> Outputs:
    """Return the outputs of several batches as one."""
    return Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def run_in_parts(run: Callable[[Pixels], Outputs], images: Pixels, largest: int) -> Outputs:
    """Run images with a function that takes up to `largest` images at once."""
    if len(images) <= largest:
        return run(images)
    return concatenate(
        run(images[start : start + largest]) for start in range(0, len(images), largest)
    )


def check_pixels(images: Pixels, pixels: tuple[int, ...]) -> None:
    """Raise a `BackendError` unless images are uint8 and have the shape (batch, *pixels)."""
    if images.dtype != np.uint8 or images.shape[1:] != pixels:
        shape = ", ".join(map(str, pixels))
        raise BackendError(
            f"expected uint8 pixels (batch, {shape}), came {images.dtype} {images.shape}"
        )


def check_timed(images: Pixels, largest: int) -> None:
    """Raise a `BackendError` unless there are images, and no more than run at once."""
    if not 1 <= len(images) <= largest:
        raise BackendError(f"expected 1 to {largest} images to time at once, came {len(images)}")


def try_out(
    name: str,
    run: Callable[[Pixels], Outputs],
    pixels: tuple[int, ...],
    batches: tuple[int, int, int],
) -> None:
    """Run the smallest and the largest batch once: a graph that loads may still fail to run.

    Raises:
        BackendError: a run fails, or its outputs are not finite.
    """
    for size in sorted({batches[0], batches[-1]}):
        outputs = run(np.zeros((size, *pixels), np.uint8))
        if not all(np.isfinite(column).all() for column in outputs):
            raise BackendError(
                f"backend {name}: the outputs for black images, {size} at once, are not finite"
            )
