"""When the server refuses, how it starts and how it ends."""

import asyncio
import json
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.server_attacks import png_of_16_bits
from benchmarks.server_load import Server, post_file, running_server
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.install import install_hint
from examples.server import limits
from examples.server.__main__ import main
from examples.server.limits import Limits, PixelShare, TokenBuckets
from tests.examples.clients import FORM, form

PHOTO = Path(__file__).parents[1] / "golden" / "photos" / "test" / "blue_sky" / "0.png"


@pytest.fixture(scope="module")
def strict(server_extra: None, golden: Path) -> Iterator[Server]:
    """Return a server for one request at a time, with two images that wait, and a pause of 1 s."""
    options = ("--max-requests", 1, "--max-seconds", 2, "--max-waiting", 2, "--max-wait-ms", 1000)
    with running_server(golden, *options) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


def begin(server: Server, client: str = "") -> HTTPConnection:
    """Send the head of a request whose body does not come, of a client that a proxy names."""
    connection = server.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "999")
    if client:
        connection.putheader("X-Forwarded-For", client)
    connection.endheaders(b'{"image":')
    return connection


def answer(connection: HTTPConnection) -> tuple[int, Any, str | None]:
    with connection.getresponse() as response:
        return response.status, json.loads(response.read()), response.headers.get("Retry-After")


def test_one_request_too_many_is_sent_away_and_a_slow_one_ended(strict: Server) -> None:
    slow = begin(strict)
    deadline = time.monotonic() + 5
    while post_file(other := strict.connect(), b"")[0] != 503:  # until the slow one is inside
        assert time.monotonic() < deadline
        other.close()
    quick = begin(strict)
    status, reason, retry = answer(quick)
    assert (status, retry) == (503, "1")
    assert "busy" in reason["error"]
    status, reason, _ = answer(slow)
    assert (status, reason["error"]) == (408, "the body was not here within 2 s")
    assert post_file(strict.connect(), PHOTO.read_bytes())[0] == 200


def test_slow_bodies_of_one_client_leave_room_for_others(server_extra: None, golden: Path) -> None:
    options = ("--rate", 100, "--max-requests", 16, "--max-seconds", 3, "--proxy", "127.0.0.1")
    with running_server(golden, *options) as server:
        slow = [begin(server, client="192.0.2.1") for _ in range(18)]
        assert asked_for(server, "192.0.2.2") == 415, "another client is let in"
        answers = sorted(((status, retry) for status, _, retry in map(answer, slow)), key=str)
        assert answers == [(408, None)] * 2 + [(429, "1")] * 16, "of 16 places an eighth"
        assert asked_for(server, "192.0.2.1") == 415, "places are given back"


def test_places_of_a_client() -> None:
    assert Limits().requests_of_a_client == 32
    assert Limits(requests=1).requests_of_a_client == 1
    assert Limits(rate=0.0).requests_of_a_client == 256


def test_images_that_find_no_room_in_the_queue_are_sent_away(strict: Server) -> None:
    edge, photo = b"--edge\r\n", PHOTO.read_bytes()
    head = b'Content-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    body = b"".join(edge + head + photo + b"\r\n" for _ in range(3)) + b"--edge--\r\n"
    connection = strict.connect()
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    connection.request("POST", "/predict", body, kind)
    status, reason, retry = answer(connection)
    assert (status, retry) == (503, "1")
    assert "images wait" in reason["error"]


def test_a_client_that_asks_too_often_is_told_when_to_come_back(
    server_extra: None, golden: Path
) -> None:
    with running_server(golden, "--rate", 0.1, "--burst", 3) as server:
        photo = PHOTO.read_bytes()
        assert [post_file(server.connect(), photo)[0] for _ in range(4)] == [200, 200, 200, 429]
        connection = server.connect()
        connection.request("POST", "/predict", b"", {"Content-Type": "application/json"})
        status, reason, retry = answer(connection)
        assert (status, reason) == (429, {"error": "too many requests; wait 10 s"})
        assert retry == "10"
        assert asked_for(server, "192.0.2.1") == 429, "no proxy: what the client says is no proof"


def test_behind_a_proxy_each_of_its_clients_has_its_own_rate(
    server_extra: None, golden: Path
) -> None:
    options = ("--rate", 0.1, "--burst", 1, "--proxy", "127.0.0.1")
    with running_server(golden, *options) as server:
        clients = ("192.0.2.1", "192.0.2.1", "192.0.2.2")
        assert [asked_for(server, client) for client in clients] == [415, 429, 415]


def asked_for(server: Server, client: str) -> int:
    """Return the status of a request that says that it is passed on for a client."""
    connection = server.connect()
    connection.request("POST", "/predict", b"", {"X-Forwarded-For": client})
    return answer(connection)[0]


def test_tokens_come_back_with_time_and_clients_do_not_share_them() -> None:
    buckets = TokenBuckets(rate=2.0, burst=3)
    assert [buckets.seconds_to_wait("a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.seconds_to_wait("b", 0.0) == 0
    assert buckets.seconds_to_wait("a", 0.25) == pytest.approx(0.25)
    assert buckets.seconds_to_wait("a", 0.5) == 0
    assert buckets.seconds_to_wait("a", 0.5) == pytest.approx(0.5)
    assert [buckets.seconds_to_wait("a", 99.0) for _ in range(4)] == [0, 0, 0, 0.5]


def test_no_rate_is_no_limit_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    free = TokenBuckets(rate=0.0, burst=1)
    assert not any(free.seconds_to_wait("a", 0.0) for _ in range(99))
    monkeypatch.setattr(limits, "_CLIENTS", 2)
    buckets = TokenBuckets(rate=1.0, burst=1)
    for client in ("a", "b", "c"):
        assert buckets.seconds_to_wait(client, 0.0) == 0
    assert buckets.seconds_to_wait("c", 0.0) == 1
    assert buckets.seconds_to_wait("b", 0.0) == 1
    assert buckets.seconds_to_wait("a", 0.0) == 0, "who was quiet longest is forgotten"


@pytest.mark.parametrize("wrong", [{"pixels": 0}, {"seconds": 0.0}, {"rate": -1.0}])
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected counts from 1 on"):
        Limits(**wrong)


def test_images_of_a_client_wait_for_their_share_in_order() -> None:
    async def run() -> list[int]:
        share, begun = PixelShare(100), []

        async def decode(pixels: int) -> None:
            await share.take(pixels)
            begun.append(pixels)

        tasks = [asyncio.create_task(decode(pixels)) for pixels in (60, 40, 500, 1)]
        seen = []
        for pixels in (60, 40, 500):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.append(len(begun))
            share.give_back(pixels)
        await asyncio.gather(*tasks)
        assert begun == [60, 40, 500, 1]
        return seen

    assert asyncio.run(run()) == [2, 2, 3]


def test_pixels_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, images in ((1, 1), (2, 1), (16, 8)):
        monkeypatch.setattr(limits, "usable_cores", lambda cores=cores: cores)
        assert Limits(pixels=1000).pixels_of_a_client == 1000 * images
    assert Limits(rate=0.0).pixels_of_a_client == math.inf


def test_costly_images_of_one_client_keep_no_other_waiting(
    server_extra: None, golden: Path
) -> None:
    """Without shares, as many of them as may wait are decoded before the other client's."""
    image, photo = png_of_16_bits(3000), PHOTO.read_bytes()
    options = ("--rate", 1000, "--burst", 1000, "--max-waiting", 24, "--proxy", "127.0.0.1")
    with running_server(golden, *options, "--max-pixels", 9_000_000) as server:
        headers = {"Content-Type": FORM, "X-Forwarded-For": "192.0.2.1"}
        senders = [server.connect() for _ in range(4)]
        for connection in senders:
            connection.request("POST", "/predict", form(*[image] * 12), headers)
        deadline = time.monotonic() + 10
        while "capt_waiting_images 48.0" not in metrics(server):
            assert time.monotonic() < deadline, "some were sent away: there was no room"
            time.sleep(0.01)
        start = time.monotonic()
        assert post_file(server.connect(), photo)[0] == 200
        assert time.monotonic() - start < 2
        waiting = float(metrics(server).split("\ncapt_waiting_images ")[1].split()[0])
        assert waiting > 24, "the other's still wait"
        server.process.kill()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_what_waits_is_answered_before_the_server_ends(
    server_extra: None, golden: Path, kind: signal.Signals
) -> None:
    with running_server(golden, "--max-wait-ms", 1500) as server:
        answers: list[tuple[int, Any]] = []
        client = threading.Thread(
            target=lambda: answers.append(post_file(server.connect(), PHOTO.read_bytes()))
        )
        client.start()
        while "capt_waiting_images 1.0" not in metrics(server):
            time.sleep(0.01)
        server.process.send_signal(kind)
        client.join()
        assert server.process.wait(20) == 0
        assert answers[0][0] == 200
        log = server.log.read_text()
        assert log.endswith("ended; all that waited has been answered\n")
        assert "Traceback" not in log


def test_a_second_ctrl_c_cuts_off_what_waits_and_says_so(server_extra: None, golden: Path) -> None:
    with running_server(golden, "--max-seconds", 30) as server:
        slow = begin(server)
        deadline = time.monotonic() + 10
        time.sleep(0.3)  # until it is inside
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        slow.close()
        log = server.log.read_text()
        assert "all that waited has been answered" not in log
        assert log.endswith("ended; left without an answer: 1\n")


def metrics(server: Server) -> str:
    connection = server.connect()
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_a_missing_package_is_named_with_the_fix(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, [str(golden)])
    assert result.exit_code == 2
    assert result.stderr == f"Error: needs uvicorn: {install_hint('server')}\n"


def test_a_port_that_is_taken_and_a_missing_bundle_are_errors_of_one_line(
    server_extra: None, golden: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, [str(golden), "--port", port])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
    result = CliRunner().invoke(main, [str(tmp_path / "none.capt"), "--port", "0"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
