"""Requests on their way from `submit` to a batch."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import BackendError, BusyError, ConfigError

Pixels = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class BatcherOptions:
    """When a batch starts, and how many requests may wait for theirs."""

    max_batch: int = 32
    max_wait_ms: float = 2.0  # of any request, from its submission on, while the device is idle
    max_waiting: int = 256  # requests that are being decoded or wait for a batch

    def __post_init__(self) -> None:
        longest = 1000 * threading.TIMEOUT_MAX
        if min(self.max_batch, self.max_waiting) < 1 or not 0 <= self.max_wait_ms <= longest:
            raise ConfigError(
                f"batcher: expected max_batch and max_waiting of at least 1 and a max_wait_ms from "
                f"0 to {longest:.0f}, came {self}"
            )


@dataclass(eq=False)
class Request(Generic[T]):
    """One image, and the answer to come."""

    run: Callable[[Pixels], list[T]]  # keeps its classifier alive until it is answered
    future: "Future[T]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)  # seconds
    pixels: Pixels | None = None

    def begin(self) -> bool:
        """Tell whether it still wants an answer, and make sure that it cannot be cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        if self.begin():
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Cancel it, and tell those who wait for it."""
        self.future.cancel()
        self.future.set_running_or_notify_cancel()


class RequestQueue(Generic[T]):
    """Those that are being decoded, and those that wait for a batch. Thread-safe."""

    def __init__(self, options: BatcherOptions) -> None:
        self._options = options
        self._changed = threading.Condition()
        self._ready: deque[Request[T]] = deque()
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

    def put(self, request: Request[T]) -> None:
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

    def take(self) -> list[Request[T]]:
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

    def _pop(self, most: int) -> list[Request[T]]:
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
