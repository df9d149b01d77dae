"""Executions of an engine, made when threads need them and used again by others."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from capt_deploy.backends.tensorrt.device import Device
from capt_deploy.backends.tensorrt.execution import Execution
from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import Process

_MOST = 4  # executions, each with its own memory; more threads wait, as the GPU is busy


class Pool:
    """Lends executions: as many as threads ask for at once, up to four or what the GPU holds."""

    def __init__(self, device: Device, make: Callable[[], Execution]) -> None:
        self._device = device
        self._make: Callable[[], Execution] | None = make  # None: closed
        self._most = _MOST
        self._made = 0  # lent or free
        self._making = False  # one at a time, so that it is known whether another one was there
        self._free: list[Execution] = []
        self._changed = threading.Condition()
        self._process = Process()

    @contextmanager
    def execution(self) -> Iterator[Execution]:
        """Yield an execution that no other thread uses meanwhile.

        Raises:
            BackendError: the pool is closed, or the GPU cannot hold a single one.
        """
        with self._device.active():
            own = self._take()
            try:
                yield own
            except BaseException:  # its stream may hold half a run
                with suppress(Exception):  # what it was called for failed first
                    own.close()
                with self._changed:
                    self._made -= 1
                    self._changed.notify_all()
                raise
            with self._changed:
                self._free.append(own)
                self._changed.notify_all()

    def close(self) -> None:
        """Free all of them once they are idle."""
        if not self._process.is_this:  # a forked copy holds nothing of the GPU's
            return
        with self._changed:
            self._make = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._making and self._made == len(self._free))
            free, self._free, self._made = self._free, [], 0
        with self._device.active():
            for own in free:
                own.close()

    def _take(self) -> Execution:
        while True:
            with self._changed:
                self._changed.wait_for(self._can_take)
                if self._make is None:
                    raise BackendError("the backend is closed; load the classifier again")
                if self._free:
                    return self._free.pop()
                make, self._making = self._make, True
            try:
                own = make()
            except BaseException as error:
                with self._changed:
                    self._making = False
                    self._changed.notify_all()
                    if not isinstance(error, BackendError) or not self._made:
                        raise
                    self._most = self._made  # no memory for more: wait for one of those
            else:
                with self._changed:
                    self._making = False
                    self._made += 1
                    self._changed.notify_all()
                return own

    def _can_take(self) -> bool:
        more = not self._making and self._made < self._most
        return self._make is None or bool(self._free) or more
