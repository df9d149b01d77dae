"""Put requests of many threads together into batches, without letting them pile up.

A request is decoded in a pool of threads, or in the caller's own where the caller could change the
image later. One thread runs the batches: as many as are ready once `max_batch` are, or once one of
them has waited for `max_wait_ms`. What arrives while a batch runs is in the next one.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.cores import usable_cores
from capt_deploy.errors import BackendError, BusyError, ConfigError
from capt_deploy.images import ImageInput
from capt_deploy.process import Process

Pixels = NDArray[np.uint8]
T = TypeVar("T")
_own = threading.local()  # `queue` in the threads of a batcher


@dataclass(frozen=True)
class BatcherOptions:
    """When a batch starts, and how many requests may wait for theirs."""

    max_batch: int = 32
    max_wait_ms: float = 2.0  # of any request, from its submission on, while the device is idle
    max_waiting: int = 256  # requests that are being decoded or wait for a batch

    def __post_init__(self) -> None:
        if min(self.max_batch, self.max_waiting) < 1 or not self.max_wait_ms >= 0:
            raise ConfigError(
                f"batcher: expected max_batch and max_waiting of at least 1 and a max_wait_ms of "
                f"at least 0, came {self}"
            )


@dataclass(eq=False)
class _Request(Generic[T]):
    run: Callable[[Pixels], list[T]]  # keeps its classifier alive until it is answered
    future: "Future[T]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)  # seconds
    pixels: Pixels | None = None

    def begin(self) -> bool:
        """Tell whether it still wants an answer, and make sure that it cannot be cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        if self.begin():
            self.future.set_exception(error)

    def cancel(self) -> None:
        self.future.cancel()
        self.future.set_running_or_notify_cancel()


class Batcher(Generic[T]):
    """Answers single images in batches. Thread-safe.

    It ends by `close`, when nobody refers to it any more, or at the interpreter's exit; what waits
    then is still answered.
    """

    def __init__(
        self,
        decode: Callable[[ImageInput], Pixels],
        run: Callable[[Pixels], list[T]],
        options: BatcherOptions,
    ) -> None:
        """Start its threads.

        Args:
            decode: makes (height, width, 3) pixels of what is submitted.
            run: answers (batch, height, width, 3) pixels, one by one in order.
            options: see there.
        """
        self._decode, self._run = decode, run
        self._process = Process()
        self._queue = _Queue[T](options)
        self._pool = ThreadPoolExecutor(
            usable_cores(), "capt-decode", initializer=_mark, initargs=(self._queue,)
        )
        worker = threading.Thread(
            target=_work, args=(self._queue,), name="capt-batches", daemon=True
        )
        worker.start()
        self._end = partial(_close, self._queue, self._pool, worker, self._process)
        self._at_end = weakref.finalize(self, self._end)

    def submit(self, image: ImageInput) -> "Future[T]":
        """Return at once with the answer to come; errors of this image come with it as well.

        Paths and bytes are decoded in the pool. Arrays and Pillow images, which the caller could
        change meanwhile, are preprocessed before this returns.

        Raises:
            BusyError: as many requests wait as may.
            BackendError: it is closed, its thread has died, or this is a forked process.
        """
        self._process.check()
        self._queue.enter()
        request = _Request(self._run)
        try:
            if isinstance(image, np.ndarray | Image.Image):
                _prepare(self._queue, request, self._decode, image)
            else:
                self._pool.submit(_prepare, self._queue, request, self._decode, image)
        except BaseException as cause:
            self._queue.leave()
            if isinstance(cause, RuntimeError):  # the pool's own, at the interpreter's exit
                raise BackendError(f"the batcher takes nothing any more: {cause}") from cause
            raise
        return request.future

    def close(self, *, drain: bool = True) -> None:
        """Answer what waits, or cancel it without `drain`; take nothing more. Idempotent."""
        if not drain and self._process.is_this:
            self._queue.refuse(drain=False)
        self._end()
        self._at_end.detach()


class _Queue(Generic[T]):
    """Requests on their way from `submit` to a batch. All methods are thread-safe."""

    def __init__(self, options: BatcherOptions) -> None:
        self._options = options
        self._changed = threading.Condition()
        self._ready: deque[_Request[T]] = deque()
        self._entered = 0  # requests that are decoded or ready, up to max_waiting
        self._refused: str | None = None  # why nothing is taken any more
        self._dropped: str | None = None  # why what has been decoded is not taken either
        self._cancelling = False

    def enter(self) -> None:
        """Make room for a request."""
        with self._changed:
            if self._refused:
                raise BackendError(self._refused)
            if self._entered >= self._options.max_waiting:
                raise BusyError(
                    f"expected at most {self._options.max_waiting} requests to wait, and that many "
                    f"do; try again later, or raise max_waiting"
                )
            self._entered += 1

    def leave(self) -> None:
        """Give up the room of a request that needs no batch."""
        with self._changed:
            self._entered -= 1

    def put(self, request: _Request[T]) -> None:
        """Let a decoded request wait for its batch."""
        with self._changed:
            dropped = self._dropped
            if not dropped:
                self._ready.append(request)
                self._changed.notify_all()
        if dropped:
            request.fail(BackendError(dropped))

    @property
    def cancelling(self) -> bool:
        """Whether what has not run yet shall not run."""
        return self._cancelling

    def take(self) -> list[_Request[T]]:
        """Wait for a batch; none is the last one."""
        with self._changed:
            while True:
                if not self._ready:
                    if self._dropped:
                        return []
                    self._changed.wait()
                elif (seconds := self._seconds_left()) > 0:
                    self._changed.wait(seconds)
                else:
                    return self._pop(self._options.max_batch)

    def _pop(self, most: int) -> list[_Request[T]]:
        size = min(len(self._ready), most)
        self._entered -= size
        return [self._ready.popleft() for _ in range(size)]

    def _seconds_left(self) -> float:
        """Return how long the next batch may wait for further requests."""
        if self._refused or len(self._ready) >= self._options.max_batch:
            return 0.0
        # Decoded first is not always submitted first.
        oldest = min(request.submitted for request in self._ready)
        return oldest + self._options.max_wait_ms / 1000 - time.monotonic()

    def refuse(self, *, drain: bool) -> None:
        """Take no new requests; without `drain` cancel those that wait."""
        with self._changed:
            self._refused = self._refused or "the classifier is closed; load it again"
            self._cancelling |= not drain
            waiting = [] if drain else self._pop(len(self._ready))
            self._changed.notify_all()
        for request in waiting:
            request.cancel()

    def finish(self, reason: str) -> None:
        """Take nothing of any kind any more."""
        with self._changed:
            self._refused = self._refused or reason
            self._dropped = self._dropped or self._refused
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Answer with an error whatever waits and whatever comes."""
        self.finish(reason)
        with self._changed:
            waiting = self._pop(len(self._ready))
        for request in waiting:
            request.fail(BackendError(reason))


def _prepare(
    queue: _Queue[T],
    request: _Request[T],
    decode: Callable[[ImageInput], Pixels],
    image: ImageInput,
) -> None:
    """Decode a request's image and let it wait for its batch; an error is its answer."""
    if queue.cancelling:
        request.future.cancel()
    if request.future.cancelled():
        queue.leave()
        request.cancel()
        return
    try:
        request.pixels = decode(image)
    except Exception as error:
        queue.leave()
        request.fail(error)
    else:
        queue.put(request)
    finally:
        del request  # an error's traceback leads here, and from here to the error


def _mark(queue: _Queue[T]) -> None:
    _own.queue = queue


def _work(queue: _Queue[T]) -> None:
    """Run batches until there is none."""
    _mark(queue)
    try:
        while batch := queue.take():
            _answer(batch)
            del batch  # while it waits, it keeps nothing alive
    except BaseException as error:
        queue.fail(f"the batcher's thread has died ({type(error).__name__}: {error}); load again")
        raise


def _answer(batch: list[_Request[T]]) -> None:
    """Run a batch; its error is that of each of its requests."""
    wanted = [request for request in batch if request.begin()]
    if not wanted:
        return
    try:
        pixels = np.stack([request.pixels for request in wanted if request.pixels is not None])
        answers = wanted[0].run(pixels)
        for request, answer in zip(wanted, answers, strict=True):
            request.future.set_result(answer)
    except BaseException as cause:
        for request in wanted:
            if not request.future.done():
                error = BackendError(f"the batch of {len(wanted)} images failed: {cause}")
                error.__cause__ = cause
                request.future.set_exception(error)
        if not isinstance(cause, Exception):
            raise


def _close(
    queue: _Queue[T], pool: ThreadPoolExecutor, worker: threading.Thread, process: Process
) -> None:
    """End a batcher when what waits has been answered."""
    if not process.is_this:  # a forked copy has none of these threads
        return
    queue.refuse(drain=True)
    if getattr(_own, "queue", None) is queue:  # called back by an answer: cannot wait for itself
        threading.Thread(target=_end, args=(queue, pool, worker), name="capt-close").start()
    else:
        _end(queue, pool, worker)


def _end(queue: _Queue[T], pool: ThreadPoolExecutor, worker: threading.Thread) -> None:
    pool.shutdown()
    queue.finish("the classifier is closed; load it again")
    worker.join()
