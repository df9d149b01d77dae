"""Requests on their way from `submit` to a batch."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.core.errors import BackendError, BusyError, ConfigError
from capt_deploy.serving.prediction import Prediction

Pixels = NDArray[np.uint8]
Run = Callable[[Pixels, list[DecisionOptions]], list[Prediction]]
"""Returns predictions of (batch, height, width, 3) pixels, with options for each image."""

_CLOSED = "the classifier is closed; load it again"


@dataclass(frozen=True)
class BatcherOptions:
    """When a batch starts, and how many requests may wait."""

    max_batch: int = 32
    max_wait_ms: float = 2.0  # of a request since its submission, while the device is idle
    max_waiting: int = 256  # requests that are being decoded or wait for a batch

    def __post_init__(self) -> None:
        longest = 1000 * threading.TIMEOUT_MAX
        if min(self.max_batch, self.max_waiting) < 1 or not 0 <= self.max_wait_ms <= longest:
            raise ConfigError(
                f"batcher: expected max_batch and max_waiting of at least 1 and a max_wait_ms from "
                f"0 to {longest:.0f}, came {self}"
            )


@dataclass(eq=False)
class Request:
    """One image and the future of its prediction."""

    run: Run  # keeps the classifier alive until the request is answered
    options: DecisionOptions
    future: "Future[Prediction]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)  # seconds
    pixels: Pixels | None = None  # (height, width, 3), once decoded

    def begin(self) -> bool:
        """Return whether an answer is still expected; it cannot be cancelled any more."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        if self.begin():
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Cancel the request and notify everybody who waits for it."""
        self.future.cancel()
        self.future.set_running_or_notify_cancel()


class RequestQueue:
    """Requests that are being decoded or wait for a batch. Thread-safe."""

    def __init__(self, options: BatcherOptions) -> None:
        self._options = options
        self._changed = threading.Condition()
        self._decoded: deque[Request] = deque()
        self._count = 0  # requests that are being decoded or are decoded, up to max_waiting
        self._refusal: str | None = None  # why new requests are refused
        self._end: str | None = None  # why decoded requests are refused too
        self.cancelling = False  # whether what has not run yet is cancelled

    def enter(self) -> None:
        """Count a new request in, before it is decoded."""
        with self._changed:
            if self._refusal:
                raise BackendError(self._refusal)
            if self._count >= self._options.max_waiting:
                raise BusyError(
                    f"expected at most {self._options.max_waiting} requests to wait, and that many "
                    f"do; try again later, or raise max_waiting"
                )
            self._count += 1

    def leave(self) -> None:
        """Count a request out that needs no batch."""
        with self._changed:
            self._count -= 1

    def put(self, request: Request) -> None:
        """Add a decoded request."""
        with self._changed:
            end = self._end
            if not end:
                self._decoded.append(request)
                self._changed.notify_all()
        if end:
            request.fail(BackendError(end))

    def take(self) -> list[Request]:
        """Wait for a batch; an empty one is the last."""
        with self._changed:
            while True:
                if not self._decoded:
                    if self._end:
                        return []
                    self._changed.wait()
                elif (seconds := self._seconds_left()) > 0:
                    self._changed.wait(seconds)
                else:
                    return self._pop(self._options.max_batch)

    def _pop(self, limit: int) -> list[Request]:
        size = min(len(self._decoded), limit)
        self._count -= size
        return [self._decoded.popleft() for _ in range(size)]

    def _seconds_left(self) -> float:
        """Return how long the next batch may still wait for further requests."""
        if self._refusal or len(self._decoded) >= self._options.max_batch:
            return 0.0
        # The request decoded first is not always the one submitted first.
        oldest = min(request.submitted for request in self._decoded)
        return oldest + self._options.max_wait_ms / 1000 - time.monotonic()

    def refuse(self, *, drain: bool) -> None:
        """Refuse new requests; without `drain` cancel those that wait."""
        with self._changed:
            self._refusal = self._refusal or _CLOSED
            self.cancelling |= not drain
            waiting = [] if drain else self._pop(len(self._decoded))
            self._changed.notify_all()
        for request in waiting:
            request.cancel()

    def finish(self, reason: str = _CLOSED, *, fail: bool = False) -> None:
        """Refuse everything from now on; with `fail` answer what waits with an error."""
        with self._changed:
            self._refusal = self._refusal or reason
            self._end = self._end or self._refusal
            waiting = self._pop(len(self._decoded)) if fail else []
            self._changed.notify_all()
        for request in waiting:
            request.fail(BackendError(reason))
