"""Answer single requests of many threads in batches, with a limit on how many may wait.

A pool of threads decodes images. One thread runs the batches: a batch starts once `max_batch`
requests are decoded, or once one of them has waited for `max_wait_ms`. Requests that arrive while
a batch runs are in the next one.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.core.console import counted
from capt_deploy.core.errors import BackendError
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.process import Process
from capt_deploy.data.images import ImageInput
from capt_deploy.serving.prediction import Prediction
from capt_deploy.serving.requests import BatcherOptions, Pixels, Request, RequestQueue, Run

__all__ = ["Batcher", "BatcherOptions"]
_current = threading.local()  # `queue` in the threads of a batcher


class Batcher:
    """Answers single images in batches. Thread-safe.

    It ends with `close`, when it is garbage-collected, or at the interpreter's exit; requests that
    wait then are still answered.
    """

    def __init__(
        self, decode: Callable[[ImageInput], Pixels], run: Run, options: BatcherOptions
    ) -> None:
        """Start the threads.

        Args:
            decode: returns the (height, width, 3) pixels of an image.
            run: returns predictions of (batch, height, width, 3) pixels, with options for each.
            options: size and waiting time of batches, and how many requests may wait.
        """
        self._decode, self._run = decode, run
        self._process = Process()
        self._queue = RequestQueue(options)
        self._pool = ThreadPoolExecutor(
            usable_cores(), "capt-decode", initializer=_mark_thread, initargs=(self._queue,)
        )
        worker = threading.Thread(
            target=_run_batches, args=(self._queue,), name="capt-batches", daemon=True
        )
        worker.start()
        # Functions, not methods: they must not keep the batcher alive.
        self._close = partial(_close, self._queue, self._pool, worker, self._process)
        self._finalizer = weakref.finalize(self, self._close)

    def submit(self, image: ImageInput, options: DecisionOptions) -> "Future[Prediction]":
        """Return at once with the future of a prediction, which also carries the image's errors.

        Paths and bytes are decoded in the pool. Arrays and Pillow images, which the caller could
        change meanwhile, are preprocessed before this returns.

        Raises:
            BusyError: `max_waiting` requests wait.
            BackendError: it is closed, its thread has died, or this is a forked process.
        """
        self._process.check()
        self._queue.enter()
        request = Request(self._run, options)
        try:
            if isinstance(image, np.ndarray | Image.Image):
                _prepare(self._queue, request, self._decode, image)
            else:
                self._pool.submit(_prepare, self._queue, request, self._decode, image)
        except BaseException as cause:
            if not request.future.done():
                self._queue.leave()
            if isinstance(cause, RuntimeError):  # of the pool, at the interpreter's exit
                raise BackendError(f"the batcher takes nothing any more: {cause}") from cause
            raise
        return request.future

    def close(self, *, drain: bool = True, after: Callable[[], None] | None = None) -> None:
        """Answer the requests that wait, or cancel them without `drain`; refuse new ones.

        `after` is called once the last answer is given: before this returns, or later if this is
        called by a callback of an answer, which cannot wait for itself. A second call does nothing.
        """
        if not drain and self._process.is_this:
            self._queue.refuse(drain=False)
        self._close(after)
        self._finalizer.detach()


def _prepare(
    queue: RequestQueue,
    request: Request,
    decode: Callable[[ImageInput], Pixels],
    image: ImageInput,
) -> None:
    """Decode the image of a request and queue it for a batch; an error answers it."""
    if queue.cancelling:
        request.future.cancel()
    if request.future.cancelled():
        queue.leave()
        request.cancel()
        return
    try:
        request.pixels = decode(image)
    except BaseException as error:  # no future may be left without an answer
        queue.leave()
        request.fail(error)
        if not isinstance(error, Exception):
            raise
    else:
        queue.put(request)
    finally:
        del request  # breaks the cycle from the error's traceback to the request and its error


def _mark_thread(queue: RequestQueue) -> None:
    _current.queue = queue


def _run_batches(queue: RequestQueue) -> None:
    """Run batches until the queue ends."""
    _mark_thread(queue)
    try:
        while batch := queue.take():
            _answer(batch)
            del batch  # keeps nothing alive while the thread waits
    except BaseException as error:
        reason = f"the batcher's thread has died ({type(error).__name__}: {error}); load again"
        queue.finish(reason, fail=True)
        raise


def _answer(batch: list[Request]) -> None:
    """Run a batch; an error answers each of its requests."""
    requests = [request for request in batch if request.begin()]
    if not requests:
        return
    try:
        pixels = np.stack([request.pixels for request in requests if request.pixels is not None])
        predictions = requests[0].run(pixels, [request.options for request in requests])
        for request, prediction in zip(requests, predictions, strict=True):
            request.future.set_result(prediction)
    except BaseException as cause:
        for request in requests:
            if not request.future.done():
                error = BackendError(
                    f"the batch of {counted(len(requests), 'image')} failed: {cause}"
                )
                error.__cause__ = cause
                request.future.set_exception(error)
        if not isinstance(cause, Exception):
            raise


def _close(
    queue: RequestQueue,
    pool: ThreadPoolExecutor,
    worker: threading.Thread,
    process: Process,
    after: Callable[[], None] | None = None,
) -> None:
    """End a batcher once the requests that wait have been answered."""
    if not process.is_this:  # a forked copy has none of these threads
        return

    def end() -> None:
        pool.shutdown()
        queue.finish()
        worker.join()
        if after is not None:
            after()

    queue.refuse(drain=True)
    if getattr(_current, "queue", None) is queue:  # a callback of an answer
        threading.Thread(target=end, name="capt-close").start()
    else:
        end()
