"""Run an engine on one stream: pinned staging, memory on the GPU, a CUDA graph for each batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.backends.batch_sizes import buckets
from capt_deploy.backends.tensorrt.device import Device
from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import never_free_in_copies

INPUT = "images"
_SCRATCH = "scratch"  # beside the names of tensors
_FLOAT = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of an engine, by the batch sizes that are run."""

    pixels: tuple[int, ...]  # (height, width, 3)
    columns: Mapping[str, int]  # of each output, in the order of `Outputs`
    batches: tuple[int, ...]  # rising; others are filled up to the next one

    @property
    def largest(self) -> int:
        """The most images run at once."""
        return self.batches[-1]

    def batch_for(self, images: int) -> int:
        """Return the smallest batch that holds so many images, at most `largest`."""
        return next(batch for batch in self.batches if batch >= images)


def read_layout(trt: Any, engine: Any, batches: tuple[int, int, int]) -> Layout:
    """Return the layout of a deserialised engine.

    Raises:
        BackendError: it is not one of a bundle's graph.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(names) != {INPUT, *Outputs._fields}:
        wanted = ", ".join((INPUT, *Outputs._fields))
        raise BackendError(f"expected a graph with {wanted}; came {', '.join(names)}")
    batch, *pixels = engine.get_tensor_shape(INPUT)
    columns = {name: tuple(engine.get_tensor_shape(name))[1:] for name in Outputs._fields}
    types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
    floats = all(types[name] == np.float32 for name in columns)
    if batch != -1 or types[INPUT] != np.uint8 or len(pixels) != 3 or not floats:
        raise BackendError(
            f"expected uint8 (batch, height, width, 3) in and float32 out; came {types[INPUT]} "
            f"{(batch, *pixels)} in and {', '.join(str(types[name]) for name in columns)} out"
        )
    if any(len(shape) != 1 for shape in columns.values()):
        raise BackendError(f"expected outputs of two dimensions; came {columns}")
    return Layout(
        tuple(pixels),
        {name: int(shape[0]) for name, shape in columns.items()},
        buckets(*batches),
    )


class Execution:
    """One stream and its memory. For one thread at a time, inside `device.active()`."""

    def __init__(
        self,
        device: Device,
        layout: Layout,
        new_context: Callable[[int], Any],
        scratch: int,
        *,
        capture: bool,
    ) -> None:
        """Allocate everything.

        Args:
            device: the GPU.
            layout: of the engine.
            new_context: makes an execution context that computes in the memory at an address.
            scratch: how many bytes of that memory an execution context needs.
            capture: make a CUDA graph for each batch size, which has an execution context of its
                own, for changing the shape of one would make its graph wrong. They share memory.
        """
        self._device, self._layout = device, layout
        self._new_context, self._capture = new_context, capture
        self._contexts: dict[int, Any] = {}  # by batch if captured, else one, under 0
        self._graphs: dict[int, Any] = {}  # by batch
        self._stream = device.stream()
        self._addresses: dict[str, int] = {}
        self._staging: dict[str, NDArray[np.uint8]] = {}
        try:
            self._addresses[_SCRATCH] = device.allocate(max(scratch, 1))
            for name in (INPUT, *layout.columns):
                size = layout.largest * self._row_bytes(name)
                self._addresses[name] = device.allocate(size)
                self._staging[name] = device.pinned(size)
            if not capture:  # now, for TensorRT-RTX's has memory of its own, which may be missing
                self._make_context(0)
        except BaseException:
            self.close()
            raise

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run (batch, height, width, 3) pixels, at most the layout's largest batch."""
        self._put(images)
        self._enqueue(self._layout.batch_for(len(images)))
        for name in self._layout.columns:
            self._device.to_host(
                self._staged(name, len(images)), self._addresses[name], self._stream
            )
        self._device.synchronize(self._stream)
        # Copies: the staging memory is overwritten by the next run.
        return Outputs(
            *(
                self._staged(name, len(images)).view(np.float32).reshape(-1, columns).copy()
                for name, columns in self._layout.columns.items()
            )
        )

    def time(self, images: NDArray[np.uint8], iterations: int) -> list[float]:
        """Return milliseconds of runs one behind the other; see `DeviceTimed`."""
        self._put(images)
        batch = self._layout.batch_for(len(images))
        self._enqueue(batch)  # what is made once is made here
        events = [self._device.record(self._stream)]
        try:
            for _ in range(iterations):
                self._enqueue(batch)
                events.append(self._device.record(self._stream))
            self._device.synchronize(self._stream)
            return [self._device.elapsed_ms(*pair) for pair in pairwise(events)]
        finally:
            for event in events:
                self._device.free_event(event)

    def close(self) -> None:
        """Free everything, once nothing runs."""
        self._device.synchronize(self._stream)
        for graph in self._graphs.values():
            self._device.free_graph(graph)
        self._contexts.clear()
        for address in self._addresses.values():
            self._device.free(address)
        for memory in self._staging.values():
            self._device.free_pinned(memory)
        self._device.free_stream(self._stream)

    def _row_bytes(self, name: str) -> int:
        return prod(self._layout.pixels) if name == INPUT else self._layout.columns[name] * _FLOAT

    def _staged(self, name: str, rows: int) -> NDArray[np.uint8]:
        return self._staging[name][: rows * self._row_bytes(name)]

    def _put(self, images: NDArray[np.uint8]) -> None:
        """Copy images to the GPU. What fills up a batch is left of earlier runs, and not read."""
        staged = self._staged(INPUT, len(images))
        staged.reshape(images.shape)[:] = images
        self._device.to_device(self._addresses[INPUT], staged, self._stream)

    def _enqueue(self, batch: int) -> None:
        if not self._capture:
            context = self._contexts[0]
            self._shape(context, batch)
            self._execute(context)
            return
        if batch not in self._graphs:
            context = self._make_context(batch)
            self._shape(context, batch)
            self._execute(context)  # what a new shape puts off must not become part of the graph
            self._device.synchronize(self._stream)
            self._graphs[batch] = self._record(context)
        self._device.launch(self._graphs[batch], self._stream)

    def _record(self, context: Any) -> Any:
        try:
            return self._device.capture(lambda: self._execute(context), self._stream)
        except BackendError as cause:
            advice = "load with RuntimeOptions(cuda_graphs=False)"
            raise BackendError(f"no CUDA graph of this engine ({cause}); {advice}") from cause

    def _make_context(self, key: int) -> Any:
        context = self._new_context(self._addresses[_SCRATCH])
        if context is None:
            raise BackendError("the engine makes no execution context; is the GPU's memory full?")
        never_free_in_copies(context)
        for name in (INPUT, *self._layout.columns):
            if not context.set_tensor_address(name, self._addresses[name]):
                raise BackendError(f"the engine does not take memory for {name}")
        self._contexts[key] = context
        return context

    def _shape(self, context: Any, batch: int) -> None:
        if not context.set_input_shape(INPUT, (batch, *self._layout.pixels)):
            raise BackendError(f"the engine does not take a batch of {batch}")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise BackendError("the engine failed to run")
