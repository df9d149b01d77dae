"""Damaged requests, over a real socket: a documented status or the connection's end, no hang."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.server_attacks import jpeg_of_scans, png_of_16_bits
from benchmarks.server_load import Server, is_right, post_file, running_server, tolerance
from capt_deploy.serving.classifier import Classifier
from tests.examples.clients import FORM, JSON, encoded, form, picture, send

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.capt"
GOOD = picture(0)
IMAGES = (*map(picture, range(6)), jpeg_of_scans(64, 20), png_of_16_bits(64), b"GIF89a", b"")
BODIES = (
    *((form(image), FORM) for image in IMAGES),
    (form(*IMAGES), FORM),
    *((json.dumps({"image": encoded(image)}).encode(), JSON) for image in IMAGES[:4]),
    (json.dumps({"images": [*map(encoded, IMAGES)]}).encode(), JSON),
)
ANSWERED = {200, 400, 413, 415, 422}
SECONDS = 0.5  # that the server waits

PIECES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"--edge", b"\r\n", b"\r\n\r\n", b"\0", b'"', b"[", b"{", b"\xff\xd8", b": "]),
    st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"0\r\n\r\n"]),
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), PIECES), max_size=6)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.load(GOLDEN)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        pytest.importorskip(name)
    with running_server(GOLDEN, "--max-bytes", 100_000, "--max-seconds", SECONDS) as running:
        yield running
        assert running.process.poll() is None
        log = running.log.read_text()
        assert "Traceback" not in log
        assert len(log) < 20_000


def edited(content: bytes, edits: list[tuple[float, int, bytes]], most: int) -> bytes:
    """Replace some bytes at each place, a share of the first `most` bytes, by others."""
    for place, length, piece in edits:
        start = int(place * min(len(content), most))
        content = content[:start] + piece + content[start + length :]
    return content


def check_it_still_answers(server: Server, classifier: Classifier) -> None:
    connection = server.connect()
    status, answer = post_file(connection, GOOD)
    connection.close()
    assert is_right(status, answer, classifier(GOOD), tolerance(classifier.precision))


@settings(deadline=None)
@given(body=st.sampled_from(BODIES), edits=EDITS, most=st.sampled_from([100, 10**6]))
def test_a_damaged_body_is_answered_or_refused(
    server: Server,
    classifier: Classifier,
    body: tuple[bytes, str],
    edits: list[tuple[float, int, bytes]],
    most: int,
) -> None:
    content, kind = body
    status, answer, _ = send(server, edited(content, edits, most), kind)
    assert status in ANSWERED
    assert [*answer] == ["predictions" if status == 200 else "error"]
    check_it_still_answers(server, classifier)


@settings(deadline=None)
@given(
    body=st.sampled_from(BODIES),
    edits=EDITS,
    most=st.sampled_from([20, 200, 10**6]),
    end=st.booleans(),
)
def test_a_damaged_request_is_answered_or_ended(
    server: Server,
    classifier: Classifier,
    body: tuple[bytes, str],
    edits: list[tuple[float, int, bytes]],
    most: int,
    end: bool,
) -> None:
    content, kind = body
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    came = bytearray()
    with socket.create_connection((server.host, server.port), timeout=20) as client:
        try:
            client.sendall(edited(request, edits, most))
            if end:
                client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65536):  # a hang ends in TimeoutError
                came += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    statuses = re.findall(rb"^HTTP/1\.1 (\d+) ", came, re.MULTILINE)
    # 404 and 405: another path or method; 408: the body is longer; 307: "/predict/".
    assert {*map(int, statuses)} <= ANSWERED | {307, 404, 405, 408}
    check_it_still_answers(server, classifier)
