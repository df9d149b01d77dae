"""Limits on the size, the rate and the cost of requests."""

import asyncio
import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.machine import usable_cores

_CLIENTS = 10_000  # remembered at once; then the one that was quiet longest is forgotten


class RefusedError(Exception):
    """A request that is refused, with the HTTP status and the reason for the client."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
        self.retry_after = retry_after  # seconds


@dataclass(frozen=True)
class Limits:
    """The most that a server takes.

    Waiting bodies need up to `body_bytes` times `requests` of memory, and an eighth more. The one
    that is being parsed needs up to 8 times its size besides, and so do pixels of decoded images.
    """

    body_bytes: int = 10 * 2**20
    seconds: float = 30.0  # until a head, or a body, is here; an idle connection
    pixels: int = 50_000_000  # of an image; decoded, each takes 3 bytes or more
    images: int = 16  # of a request
    requests: int = 256  # at once, of all clients
    rate: float = 20.0  # requests per second and client; 0: clients are not told apart
    burst: int = 40  # requests that a client may send at once after a pause

    def __post_init__(self) -> None:
        counts = (self.body_bytes, self.pixels, self.images, self.requests, self.burst)
        if min(counts) < 1 or not self.seconds > 0 or not self.rate >= 0:
            raise ConfigError(
                f"limits: expected counts from 1 on, seconds above 0 and a rate from 0 on, "
                f"came {self}"
            )

    @property
    def requests_of_a_client(self) -> int:
        """Return how many requests of one client may be under way: others need room as well."""
        return max(1, self.requests // 8) if self.rate else self.requests

    @property
    def pixels_of_a_client(self) -> float:
        """Return how many pixels of one client are decoded at once: about half of the cores' work.

        A file of few bytes can cost as much as a large photo. Other clients' images do not wait
        behind those of a client that sends many.
        """
        return self.pixels * max(1, usable_cores() // 2) if self.rate else math.inf


class PixelShare:
    """The pixels of one client that may be decoded at once. For one thread, the event loop's."""

    def __init__(self, most: float) -> None:
        self._most, self._taken = most, 0
        self._turn, self._returned = asyncio.Lock(), asyncio.Event()

    async def take(self, pixels: int) -> None:
        """Wait, first come, first served, until there is room; an image alone always has it."""
        async with self._turn:
            while self._taken and self._taken + pixels > self._most:
                self._returned.clear()
                await self._returned.wait()
            self._taken += pixels

    def give_back(self, pixels: int, _: object = None) -> None:
        """Make room, as an image has its answer; also a callback of its future."""
        self._taken -= pixels
        self._returned.set()


class TokenBuckets:
    """A bucket of `burst` tokens for each client, refilled at `rate`; a request takes one.

    For one thread, the event loop's. Memory is bounded.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, at which time

    def seconds_to_wait(self, client: str, now: float | None = None) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        if not self._rate:
            return 0.0
        now = time.monotonic() if now is None else now
        tokens, then = self._left.pop(client, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = max(0.0, (1 - tokens) / self._rate)
        self._left[client] = (tokens if wait else tokens - 1, now)
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        return wait
