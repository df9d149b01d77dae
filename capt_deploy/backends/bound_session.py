"""A session of ONNX Runtime with buffers that stay where they are, one set for each batch bucket.

CUDA graphs need that: they read and write the very addresses at which they were captured. A batch
is run in the smallest bucket that holds it; what the rest of the bucket says is dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs, RuntimeOptions, check_pixels
from capt_deploy.backends.batch_sizes import buckets
from capt_deploy.backends.tensorrt.device import Device, open_device
from capt_deploy.core.errors import BackendError, UnavailableError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Place:
    """Where the buffers are."""

    kind: str  # ONNX Runtime's name: "cuda", "cpu"
    ordinal: int
    staging: Callable[[tuple[int, ...]], Pixels]  # makes host memory, (batch, height, width, 3)


@dataclass(frozen=True)
class _Buffers:
    staging: Pixels
    images: Any  # OrtValue, like the others
    outputs: tuple[Any, ...]
    binding: Any
    options: Any  # of the run


class BoundSession:
    """Runs a session from such buffers. Not thread-safe: they are shared by all runs."""

    def __init__(
        self,
        session: Any,
        place: Place,
        batches: tuple[int, int, int],
        *,
        graphs: bool,
    ) -> None:
        self._session, self._place, self._graphs = session, place, graphs
        self._sizes = buckets(*batches)
        self._buffers: dict[int, _Buffers] = {}
        (images,) = session.get_inputs()
        self.pixels = tuple(images.shape[1:])  # height, width, 3
        self._columns = {output.name: output.shape[1:] for output in session.get_outputs()}

    @property
    def largest(self) -> int:
        """The largest batch that it takes."""
        return self._sizes[-1]

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels.

        Raises:
            BackendError: they have another shape, or the run fails.
        """
        buffers = self.fill(images)
        self.start(buffers)
        try:
            buffers.binding.synchronize_outputs()
            # A copy of its own: the next run writes into the same buffers.
            return Outputs(*(np.array(value.numpy()[: len(images)]) for value in buffers.outputs))
        except Exception as cause:  # its exceptions share no base class but this
            raise BackendError(f"backend onnxruntime cannot fetch its outputs: {cause}") from cause

    def fill(self, images: Pixels) -> _Buffers:
        """Copy images into the buffers of their bucket.

        Raises:
            BackendError: they have another shape.
        """
        check_pixels(images, self.pixels)
        size = next(size for size in self._sizes if size >= len(images))
        try:
            if size not in self._buffers:
                self._buffers[size] = self._make(size)
            buffers = self._buffers[size]
            buffers.staging[: len(images)] = images
            buffers.images.update_inplace(buffers.staging)
        except Exception as cause:  # its exceptions share no base class but this
            raise BackendError(f"backend onnxruntime cannot take {size} images: {cause}") from cause
        return buffers

    def start(self, buffers: _Buffers) -> None:
        """Run what is in the buffers.

        Raises:
            BackendError: the run fails.
        """
        try:
            self._session.run_with_iobinding(buffers.binding, buffers.options)
        except Exception as cause:
            raise BackendError(f"backend onnxruntime cannot run the graph: {cause}") from cause

    def _make(self, size: int) -> _Buffers:
        from onnxruntime import OrtValue, RunOptions

        kind, ordinal = self._place.kind, self._place.ordinal

        def value(shape: tuple[int, ...], element: Any) -> Any:
            return OrtValue.ortvalue_from_shape_and_type(shape, element, kind, ordinal)

        shape = (size, *self.pixels)
        images = value(shape, np.uint8)
        outputs = tuple(value((size, *self._columns[n]), np.float32) for n in Outputs._fields)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", images)
        for name, output in zip(Outputs._fields, outputs, strict=True):
            binding.bind_ortvalue_output(name, output)
        options = RunOptions()
        # Each shape is captured into a graph of its own; -1 is ONNX Runtime's word for none.
        number = self._sizes.index(size) + 1 if self._graphs else -1
        options.add_run_config_entry("gpu_graph_id", str(number))
        staging = self._place.staging(shape)
        staging[...] = 0
        return _Buffers(staging, images, outputs, binding, options)


class Gpu:
    """A session and its stream, where a Python package for CUDA is installed; else its own one."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.bound: BoundSession | None = None
        self.settings: dict[str, str] = {}
        self._device: Device | None = None
        self._pinned: list[NDArray[np.uint8]] = []
        try:
            self._device = open_device(ordinal)
        except UnavailableError as error:  # good for timing and pinned memory alone
            self._problem = str(error)
            return
        with self._device.active():
            self._stream = self._device.stream()
        self.settings = {"user_compute_stream": str(int(self._stream))}

    def bind(self, session: Any, options: RuntimeOptions, *, graphs: bool) -> BoundSession:
        """Return the session with buffers on this GPU, and keep it."""
        place = Place("cuda", self.ordinal, self._staging)
        self.bound = BoundSession(session, place, options.batches, graphs=graphs)
        return self.bound

    def time(self, work: Any) -> float:
        """Return how long the stream takes for what `work` puts on it, in milliseconds."""
        with self._opened() as device:
            first = device.record(self._stream)
            work()
            second = device.record(self._stream)
            device.synchronize(self._stream)
            try:
                return device.elapsed_ms(first, second)
            finally:
                device.free_event(first)
                device.free_event(second)

    def release(self) -> None:
        """Free the session and the pinned memory, which no thread may use any more."""
        pinned, self._pinned = self._pinned, []
        if self._device is None:
            self.bound = None
            return
        with self._device.active():
            with suppress(BackendError):  # what failed may not even wait
                self._device.synchronize(self._stream)  # it may still read and write there
            self.bound = None
            for memory in pinned:
                with suppress(BackendError):
                    self._device.free_pinned(memory)

    def close(self) -> None:
        """Free everything: the stream last, for the session ends on it."""
        self.release()
        if self._device is not None:
            with self._device.active(), suppress(BackendError):
                self._device.free_stream(self._stream)

    def _staging(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return host memory that the GPU reads by itself, where that can be had."""
        if self._device is None:
            return np.empty(shape, np.uint8)
        with self._opened() as device:
            memory = device.pinned(int(np.prod(shape)))
        self._pinned.append(memory)
        return memory.reshape(shape)

    @contextmanager
    def _opened(self) -> Iterator[Device]:
        if self._device is None:
            raise UnavailableError(self._problem)
        with self._device.active():
            yield self._device
