"""Put requests of many threads together into batches, without letting them pile up.

A request is decoded in a pool of threads, or in the caller's own where the caller could change the
image later. One thread runs the batches: as many as are ready once `max_batch` are, or once one of
them has waited for `max_wait_ms`. What arrives while a batch runs is in the next one.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from capt_deploy.core.errors import BackendError
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.process import Process
from capt_deploy.data.images import ImageInput
from capt_deploy.serving.requests import BatcherOptions, Pixels, Request, RequestQueue

__all__ = ["Batcher", "BatcherOptions"]
T = TypeVar("T")
_own = threading.local()  # `queue` in the threads of a batcher


def _nothing() -> None:
    pass


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
        self._queue = RequestQueue[T](options)
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
        request = Request(self._run)
        try:
            if isinstance(image, np.ndarray | Image.Image):
                _prepare(self._queue, request, self._decode, image)
            else:
                self._pool.submit(_prepare, self._queue, request, self._decode, image)
        except BaseException as cause:
            if not request.future.done():
                self._queue.leave()
            if isinstance(cause, RuntimeError):  # the pool's own, at the interpreter's exit
                raise BackendError(f"the batcher takes nothing any more: {cause}") from cause
            raise
        return request.future

    def close(self, *, drain: bool = True, after: Callable[[], None] = _nothing) -> None:
        """Answer what waits, or cancel it without `drain`; take nothing more. Idempotent.

        Args:
            drain: answer what waits.
            after: called when the last answer is given. In a callback of an answer, which cannot
                wait for itself, that is after this returns.
        """
        if not drain and self._process.is_this:
            self._queue.refuse(drain=False)
        self._end(after)
        self._at_end.detach()


def _prepare(
    queue: RequestQueue[T],
    request: Request[T],
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
    except BaseException as error:  # nothing may leave the future without an answer
        queue.leave()
        request.fail(error)
        if not isinstance(error, Exception):
            raise
    else:
        queue.put(request)
    finally:
        del request  # an error's traceback leads here, and from here to the error


def _mark(queue: RequestQueue[T]) -> None:
    _own.queue = queue


def _work(queue: RequestQueue[T]) -> None:
    """Run batches until there is none."""
    _mark(queue)
    try:
        while batch := queue.take():
            _answer(batch)
            del batch  # while it waits, it keeps nothing alive
    except BaseException as error:
        queue.fail(f"the batcher's thread has died ({type(error).__name__}: {error}); load again")
        raise


def _answer(batch: list[Request[T]]) -> None:
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
    queue: RequestQueue[T],
    pool: ThreadPoolExecutor,
    worker: threading.Thread,
    process: Process,
    after: Callable[[], None] = _nothing,
) -> None:
    """End a batcher when what waits has been answered."""
    if not process.is_this:  # a forked copy has none of these threads
        return
    queue.refuse(drain=True)
    if getattr(_own, "queue", None) is queue:  # called back by an answer: cannot wait for itself
        last = (queue, pool, worker, after)
        threading.Thread(target=_end, args=last, name="capt-close").start()
    else:
        _end(queue, pool, worker, after)


def _end(
    queue: RequestQueue[T],
    pool: ThreadPoolExecutor,
    worker: threading.Thread,
    after: Callable[[], None],
) -> None:
    pool.shutdown()
    queue.finish("the classifier is closed; load it again")
    worker.join()
    after()
