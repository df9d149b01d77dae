"""Idle and half-sent connections keep nobody out of the server."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.server_load import Server, post_file, running_server
from capt_deploy.core.errors import ConfigError
from tests.examples.clients import picture, read

GOOD = picture(0)
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = HEAD + b"Content-Length: 999\r\n\r\n{"
SECONDS = 3


@pytest.fixture(scope="module")
def few(server_extra: None, golden: Path) -> Iterator[Server]:
    """Return a server that may open 200 files, each client known by what a proxy says."""
    options = ("--max-seconds", SECONDS, "--rate", 1000, "--burst", 1000, "--proxy", "127.0.0.1")
    with running_server(golden, *options, descriptors=200) as running:
        yield running
        log = running.log.read_text()
        assert "52 requests at once, not 256: only 200 files may be open" in log
        assert "Traceback" not in log
        assert len(log) < 5_000


def begin(server: Server, sent: bytes) -> socket.socket:
    client = socket.create_connection((server.host, server.port), timeout=10)
    with suppress(OSError):  # closed already
        client.sendall(sent)
    return client


def seconds_to_answer(server: Server) -> float:
    """Return how long an answer takes, or fail."""
    start = time.monotonic()
    connection = server.connect()
    assert post_file(connection, GOOD)[0] == 200
    connection.close()
    return time.monotonic() - start


def is_closed(client: socket.socket) -> bool:
    """Tell whether the server closes a connection, and wait for it."""
    try:
        while client.recv(65536):
            pass
        return True
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    "sent", [b"", HEAD + b"X-A: ", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT"]
)
def test_260_connections_that_say_nothing_keep_nobody_out(few: Server, sent: bytes) -> None:
    open_ones = [begin(few, sent) for _ in range(260)]
    assert seconds_to_answer(few) < 2
    for one in open_ones:
        one.close()


def test_260_bodies_that_do_not_come_leave_room_for_other_clients(few: Server) -> None:
    head = HEAD + b"X-Forwarded-For: 192.0.2.9\r\nContent-Length: 999\r\n\r\n{"
    open_ones = [begin(few, head) for _ in range(260)]
    assert seconds_to_answer(few) < 2
    for one in open_ones:
        one.close()


@pytest.mark.parametrize("sent", [b"", HEAD, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nG"])
def test_a_head_that_does_not_come_in_time_is_not_waited_for(few: Server, sent: bytes) -> None:
    client, start = begin(few, sent), time.monotonic()
    if b"healthz" in sent:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    while time.monotonic() - start < SECONDS - 1:  # a byte now and then does not help
        with suppress(OSError):
            client.sendall(b"a" if sent else b"")
        time.sleep(0.2)
    assert is_closed(client)
    assert SECONDS - 0.5 < time.monotonic() - start < SECONDS + 3
    client.close()


def test_a_client_that_does_not_read_its_answers_is_sent_away(few: Server) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((few.host, few.port))
    client.settimeout(1)
    deadline = time.monotonic() + SECONDS + 20
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
    client.close()


def test_a_connection_that_works_outlasts_those_that_do_not(few: Server) -> None:
    worker = few.connect()
    idle: list[socket.socket] = []
    for _ in range(6):
        assert post_file(worker, GOOD)[0] == 200
        idle += [begin(few, b"") for _ in range(50)]
    assert post_file(worker, GOOD)[0] == 200
    for one in idle:
        one.close()


def test_what_is_no_http_is_refused_in_the_usual_form(few: Server) -> None:
    connection = few.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", "many")
    connection.endheaders()
    status, answer, headers = read(connection)
    assert (status, answer) == (400, {"error": "Invalid HTTP request received."})
    assert headers["Connection"] == "close"


def test_a_chunk_that_is_no_chunk_after_the_answer_ends_the_connection(few: Server) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    client = begin(few, head)
    assert client.recv(65536).startswith(b"HTTP/1.1 404")
    client.sendall(b"no chunk\r\n")
    assert is_closed(client)
    client.close()


def test_room_of_few_and_of_many_file_descriptors(server_extra: None) -> None:
    from examples.server.connections import room

    assert room(256, None) == room(256, 10**6) == (1088, 256)
    assert room(256, 1024) == (928, 256)
    assert room(256, 200) == (104, 52)
    assert room(1, 200) == (68, 1)
    with pytest.raises(ConfigError, match="expected a limit of at least 112 file descriptors"):
        room(256, 100)
