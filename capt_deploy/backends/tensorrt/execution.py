"""Run an engine: pinned staging, memory on the GPU, and a CUDA graph for each batch size."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from capt_deploy.backends.base import Outputs, Pixels
from capt_deploy.backends.device import Bytes, Device
from capt_deploy.backends.options import batch_buckets
from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import never_free_in_copies

INPUT = "images"
_SCRATCH = "scratch"  # a name beside those of tensors
_FLOAT_BYTES = np.dtype(np.float32).itemsize
_MOST_EXECUTIONS = 4  # each has its own memory; more threads wait, because the GPU is busy


@dataclass(frozen=True)
class Layout:
    """The tensors of an engine, and the batch sizes that it runs."""

    pixels: tuple[int, ...]  # (height, width, 3)
    columns: Mapping[str, int]  # of each output, in the order of `Outputs`
    batches: tuple[int, ...]  # rising; other sizes are filled up to the next one

    @property
    def largest(self) -> int:
        """Return the largest batch that runs at once."""
        return self.batches[-1]

    def batch_for(self, images: int) -> int:
        """Return the smallest batch that holds so many images, at most `largest`."""
        return next(batch for batch in self.batches if batch >= images)


def read_layout(engine: Any, batches: tuple[int, int, int]) -> Layout:
    """Return the layout of an engine of a bundle's graph."""
    columns = {name: int(engine.get_tensor_shape(name)[1]) for name in Outputs._fields}
    pixels = tuple(engine.get_tensor_shape(INPUT)[1:])
    return Layout(pixels, columns, batch_buckets(*batches))


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
            capture: make a CUDA graph for each batch size. Each graph has a context of its own,
                because a context that changes its shape breaks its graph; all share the memory.
        """
        self._device, self._layout = device, layout
        self._new_context, self._capture = new_context, capture
        self._contexts: dict[int, Any] = {}  # by batch if captured, else one, under 0
        self._graphs: dict[int, Any] = {}  # by batch
        self._stream = device.stream()
        self._addresses: dict[str, int] = {}
        self._staging: dict[str, Bytes] = {}
        try:
            self._addresses[_SCRATCH] = device.allocate(max(scratch, 1))
            for name in (INPUT, *layout.columns):
                size = layout.largest * self._row_bytes(name)
                self._addresses[name] = device.allocate(size)
                self._staging[name] = device.pinned(size)
            if not capture:  # now: TensorRT-RTX allocates memory with the context, and may fail
                self._make_context(0)
        except BaseException:
            self.close()
            raise

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels, at most the layout's largest batch."""
        self._put(images)
        self._enqueue(self._layout.batch_for(len(images)))
        for name in self._layout.columns:
            self._device.to_host(
                self._staged(name, len(images)), self._addresses[name], self._stream
            )
        self._device.synchronize(self._stream)
        # Copies, because the next run overwrites the staging memory.
        return Outputs(
            *(
                self._staged(name, len(images)).view(np.float32).reshape(-1, columns).copy()
                for name, columns in self._layout.columns.items()
            )
        )

    def time(self, images: Pixels, iterations: int) -> list[float]:
        """Return the milliseconds of runs that wait in a queue; see `DeviceTimed`."""
        self._put(images)
        batch = self._layout.batch_for(len(images))
        self._enqueue(batch)  # captures the graph of a batch size that has not run yet
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
        if name == INPUT:
            return prod(self._layout.pixels)
        return self._layout.columns[name] * _FLOAT_BYTES

    def _staged(self, name: str, rows: int) -> Bytes:
        return self._staging[name][: rows * self._row_bytes(name)]

    def _put(self, images: Pixels) -> None:
        """Copy images to the GPU. Earlier images fill up the batch; their outputs are not read."""
        staged = self._staged(INPUT, len(images))
        staged.reshape(images.shape)[:] = images
        self._device.to_device(self._addresses[INPUT], staged, self._stream)

    def _enqueue(self, batch: int) -> None:
        if not self._capture:
            self._set_batch(self._contexts[0], batch)
            self._execute(self._contexts[0])
            return
        if batch not in self._graphs:
            context = self._make_context(batch)
            self._set_batch(context, batch)
            self._execute(context)  # work that a new shape delays must not become part of the graph
            self._device.synchronize(self._stream)
            try:
                graph = self._device.capture(lambda: self._execute(context), self._stream)
            except BackendError as cause:
                advice = "load with RuntimeOptions(cuda_graphs=False)"
                raise BackendError(f"no CUDA graph of this engine ({cause}); {advice}") from cause
            self._graphs[batch] = graph
        self._device.launch(self._graphs[batch], self._stream)

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

    def _set_batch(self, context: Any, batch: int) -> None:
        if not context.set_input_shape(INPUT, (batch, *self._layout.pixels)):
            raise BackendError(f"the engine does not take a batch of {batch}")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise BackendError("the engine failed to run")


class ExecutionPool:
    """Lends executions to threads: as many as run at once, up to four or what the GPU holds."""

    def __init__(self, device: Device, make: Callable[[], Execution]) -> None:
        self._device = device
        self._make: Callable[[], Execution] | None = make  # None: closed
        self._most = _MOST_EXECUTIONS
        self._made = 0  # lent or free
        self._free: list[Execution] = []
        self._changed = threading.Condition()

    @contextmanager
    def execution(self) -> Iterator[Execution]:
        """Lend an execution that no other thread uses meanwhile.

        Raises:
            BackendError: the pool is closed, or the GPU cannot hold a single execution.
        """
        with self._device.active():
            execution = self._take()
            try:
                yield execution
            except BaseException:  # its stream may hold half a run
                with suppress(Exception):  # the first error is the one to report
                    execution.close()
                with self._changed:
                    self._made -= 1
                    self._changed.notify_all()
                raise
            with self._changed:
                self._free.append(execution)
                self._changed.notify_all()

    def close(self) -> None:
        """Free all executions once they are idle."""
        with self._changed:
            self._make = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._made == len(self._free))
            free, self._free, self._made = self._free, [], 0
        with self._device.active():
            for execution in free:
                execution.close()

    def _take(self) -> Execution:
        with self._changed:
            while True:
                self._changed.wait_for(self._can_take)
                if self._make is None:
                    raise BackendError("the backend is closed; load the classifier again")
                if self._free:
                    return self._free.pop()
                try:
                    execution = self._make()
                except BackendError:
                    if not self._made:
                        raise
                    self._most = self._made  # the GPU holds no more: wait for one that is lent
                else:
                    self._made += 1
                    return execution

    def _can_take(self) -> bool:
        return self._make is None or bool(self._free) or self._made < self._most
