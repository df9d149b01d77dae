"""Limits on connections, which uvicorn leaves to a proxy: how many, and how long one may be idle.

A connection is idle while the server waits for its client: for the head of a request, or until the
client reads an answer. Each is closed after a time. Where there is no room, the one that has been
idle longest is closed for the new one, so that idle clients keep nobody out.
"""

import asyncio
import json
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from capt_deploy.core.errors import ConfigError

# asyncio accepts as many connections as the backlog at once, before it can close any; a few such
# batches are open together.
_ACCEPTED = 16
_RESERVED = 4 * _ACCEPTED + 32  # file descriptors; 32 for what else the process has open
_QUEUED = 1024  # by the kernel, until they are accepted


def file_descriptors() -> int | None:
    """Return how many this process may have open (`ulimit -n`); None where that is no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if most == resource.RLIM_INFINITY else most


def room(requests: int, descriptors: int | None) -> tuple[int, int]:
    """Return how many connections and how many requests at once there is room for.

    At least half of the connections are no request under way, so that a new one finds a place.

    Args:
        requests: the most at once that the operator allows.
        descriptors: as from `file_descriptors`.

    Raises:
        ConfigError: there are too few file descriptors for any.
    """
    connections = 4 * requests + 64
    if descriptors is not None:
        connections = min(connections, descriptors - _RESERVED)
    if connections < 16:
        raise ConfigError(
            f"expected a limit of at least {_RESERVED + 16} file descriptors, came {descriptors}; "
            f"raise it, with `ulimit -n 1024` for example"
        )
    return connections, min(requests, connections // 2)


class IdleConnections:
    """The idle connections of a server, longest idle first. For one thread, the event loop's."""

    def __init__(self, most: int, seconds: float) -> None:
        """Allow `most` connections, idle and busy together, each idle for at most `seconds`."""
        self.most, self._seconds = most, seconds
        self._timers: OrderedDict[asyncio.Transport, asyncio.TimerHandle] = OrderedDict()

    def add(self, transport: asyncio.Transport) -> None:
        """Count a connection as idle from now on, if it is not already."""
        if transport not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[transport] = loop.call_later(self._seconds, transport.abort)

    def discard(self, transport: asyncio.Transport) -> None:
        """Count a connection as busy, or as closed."""
        if timer := self._timers.pop(transport, None):
            timer.cancel()

    def close_longest(self) -> None:
        """Close the connection that has been idle longest."""
        if self._timers:
            transport = next(iter(self._timers))
            self.discard(transport)
            transport.abort()  # `close` would wait until what is written has been read


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol for one connection, which takes its place among the idle ones."""

    def __init__(self, *args: Any, idle: IdleConnections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle = idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where it is one too many, close the one that was idle longest."""
        super().connection_made(transport)
        self._idle.add(transport)
        if len(self.connections) > self._idle.most:
            self._idle.close_longest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._idle.discard(self.transport)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what has been received; it may begin a request."""
        super().handle_events()
        self._note()

    def on_response_complete(self) -> None:
        """End a request; the next one may be here already."""
        super().on_response_complete()
        self._note()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._note()

    def resume_writing(self) -> None:
        """Go on after the client has read."""
        super().resume_writing()
        self._note()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, unless an answer is under way, which would hide the refusal."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            body = json.dumps({"error": msg}).encode()
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _note(self) -> None:
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and not self.flow.write_paused and not self.transport.is_closing():
            self._idle.discard(self.transport)
        else:
            self._idle.add(self.transport)


class Server(uvicorn.Server):
    """uvicorn's server, which accepts a few connections at once while the kernel queues many."""

    def __init__(self, app: Callable[..., Any], idle: IdleConnections, **settings: Any) -> None:
        protocol = cast(type[asyncio.Protocol], partial(BoundedProtocol, idle=idle))
        super().__init__(uvicorn.Config(app, http=protocol, backlog=_ACCEPTED, **settings))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections at `sockets`."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_QUEUED)
