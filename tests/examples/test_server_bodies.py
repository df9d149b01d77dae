"""Bodies that cannot be answered get a reason, and harm nobody."""

import asyncio
import json
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from benchmarks.server_load import Server
from examples.server.limits import Limits, RefusedError
from tests.examples.clients import FORM, JSON, encoded, form, get, picture, read, send


def png_claiming(width: int, height: int) -> bytes:
    """Return the header of a PNG that says it is this large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\r"
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\x00\x00\x00\x00IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


GOOD = picture(0)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD_BODIES: dict[str, tuple[int, str, bytes | str, str | None]] = {
    "no type": (415, "no content type", GOOD, None),
    "an image alone": (415, "image/png", GOOD, "image/png"),
    "a form of text": (415, "urlencoded", "image=1", "application/x-www-form-urlencoded"),
    "malformed JSON": (400, "not valid JSON", '{"image": ', JSON),
    "empty JSON": (400, "not valid JSON", "", JSON),
    "no UTF-8": (400, "not valid JSON", b'"\xff\xfe\x80"', JSON),
    "deep JSON": (422, "JSON of more parts", "[" * 100_000, JSON),
    "many objects": (422, "JSON of more parts", json.dumps({"images": [{}] * 60_000}), JSON),
    "many strings": (413, "at most 16", json.dumps({"images": [""] * 60_000}), JSON),
    "many keys": (413, "at most 16", json.dumps({str(key): 1 for key in range(20_000)}), JSON),
    "a long number": (400, "not valid JSON", "9" * 9999, JSON),
    "JSON of another form": (422, '{"image": "BASE64"}', '{"picture": ""}', JSON),
    "both keys": (422, "other JSON", '{"image": "", "images": [""]}', JSON),
    "no images": (422, "other JSON", '{"images": []}', JSON),
    "a number": (
        422,
        "image 1: expected a string",
        json.dumps({"images": [encoded(GOOD), 5]}),
        JSON,
    ),
    "bad base64": (400, "image 0: not valid base64", '{"image": "A_-="}', JSON),
    "no ASCII": (400, "not valid JSON", '{"image": "é"}', JSON),
    "escaped, no ASCII": (400, "image 0: not valid base64", '{"image": "\\ud800"}', JSON),
    "base64 of text": (415, "image 0: not an image", json.dumps({"image": encoded(b"hi")}), JSON),
    "empty base64": (415, "image 0: not an image", '{"image": ""}', JSON),
    "17 images": (413, "at most 16", json.dumps({"images": ["aaaa"] * 17}), JSON),
    "no boundary": (400, "boundary", form(GOOD), "multipart/form-data"),
    "another boundary": (400, "multipart", form(GOOD), "multipart/form-data; boundary=other"),
    "a form without end": (400, "last boundary", form(GOOD, end=b""), FORM),
    "a form cut in a file": (400, "last boundary", form(GOOD)[:200], FORM),
    "an empty form": (400, "last boundary", b"", FORM),
    "a form of nothing": (422, "at least one file", b"--edge--\r\n", FORM),
    "17 files": (413, "at most 16", form(*[b"x"] * 17), FORM),
    "a text file": (415, "image 0: not an image", form(b"hello"), FORM),
    "an empty file": (415, "image 0: not an image", form(b""), FORM),
    "PostScript": (415, "image 0: not an image", form(EPS), FORM),
    "second is no image": (415, "image 1: not an image", form(GOOD, b"hello"), FORM),
    "a truncated image": (422, "image 0: ", form(picture(1)[:-99]), FORM),
    "a header alone": (422, "image 0: ", form(png_claiming(9, 9)), FORM),
    "many pixels": (413, "pixels", form(png_claiming(9000, 9000)), FORM),
    "a bomb": (413, "pixels", form(png_claiming(100_000, 100_000)), FORM),
    "a large body": (413, "at most 300000 bytes", form(b"x" * 300_000), FORM),
    "a huge body": (413, "at most 300000 bytes", form(b"x" * 30_000_000), FORM),
    "large JSON": (413, "at most 300000 bytes", '{"image": "' + "a" * 300_000 + '"}', JSON),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_gets_a_reason(server: Server, name: str) -> None:
    status, reason, body, kind = BAD_BODIES[name]
    came, answer, headers = send(server, body, kind)
    assert (came, [*answer]) == (status, ["error"]), answer
    assert reason in answer["error"]
    assert headers["content-type"] == "application/json"
    assert get(server, "/readyz")[0] == 200


def test_a_body_without_a_length_is_counted_as_it_comes(server: Server) -> None:
    connection = server.connect()
    chunks = iter([form(GOOD, end=b"")] + [b"x" * 10_000] * 40)
    headers = {"Content-Type": FORM, "Transfer-Encoding": "chunked"}
    connection.request("POST", "/predict", chunks, headers, encode_chunked=True)
    assert read(connection)[0] == 413


def lengths(server: Server, *heads: str) -> tuple[int, Any, dict[str, str]]:
    """Send a head with these lines about the body's length; return the answer."""
    connection = server.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", JSON)
    for head in heads:
        connection.putheader(*head.split(": "))
    connection.endheaders()
    return read(connection)


@pytest.mark.parametrize("length", ["300001", "99999999999999999999"])
@pytest.mark.parametrize("more", [(), ("Expect: 100-continue",)])
def test_a_declared_length_beyond_the_limit_is_refused_before_the_body_comes(
    server: Server, length: str, more: tuple[str, ...]
) -> None:
    start = time.monotonic()
    status, answer, _ = lengths(server, f"Content-Length: {length}", *more)
    assert (status, answer["error"]) == (413, "expected a body of at most 300000 bytes")
    assert time.monotonic() - start < 5, "nothing else has been sent"


@pytest.mark.parametrize(
    "heads",
    [
        ("Content-Length: -1",),
        ("Content-Length: 1e3",),
        ("Content-Length: 9" + "9" * 20,),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    ],
)
def test_a_length_that_is_none_or_two_is_refused_and_the_connection_ended(
    server: Server, heads: tuple[str, ...]
) -> None:
    status, answer, headers = lengths(server, *heads)  # a body on its way would be cut off
    assert (status, [*answer]) == (400, ["error"])
    assert "close" in (headers.get("Connection"), headers.get("connection"))


def test_no_length_is_no_body(server: Server) -> None:
    status, answer, _ = lengths(server)
    assert (status, answer["error"][:14]) == (400, "not valid JSON")


def test_what_else_is_wrong_with_a_request(server: Server) -> None:
    assert send(server, form(GOOD), FORM, Content_Encoding="gzip")[0] == 415
    status, answer, _ = send(server, form(GOOD), FORM, "/predict?top_k=0")
    assert (status, answer["error"][:6]) == (422, "top_k:")
    assert send(server, form(GOOD), FORM, "/predict?top_k=many")[0] == 422
    assert send(server, form(GOOD), FORM, "/nothing")[0] == 404
    assert get(server, "/predict")[0] == 405


@pytest.mark.parametrize(
    "body",
    [
        b'{"images":[' + b"{}," * 300_000 + b"{}]}",
        b'{"images":[' + b'"",' * 300_000 + b'""]}',
        b'{"image":"' + b"A" * 900_000 + b'\\ud83d\\ude00"}',
        '{"image":"é\U0001f600'.encode() + b"A" * 900_000 + b'"}',
        b'{"image":"' + b"A" * 900_000 + b'"}',
    ],
    ids=["objects", "strings", "four bytes a letter", "no ASCII", "right"],
)
def test_json_is_parsed_in_8_times_its_size(server_extra: None, body: bytes) -> None:
    from examples.server import bodies

    came = bytearray(body)
    tracemalloc.start()
    with suppress(RefusedError):
        bodies._from_json(came, Limits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(body)


def test_bodies_are_parsed_one_at_a_time(
    server_extra: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.requests import Request

    from examples.server import bodies

    inside, most = [], 0

    def parse(body: bytearray, *_: object) -> list[Any]:
        nonlocal most
        inside.append(body)
        most = max(most, len(inside))
        time.sleep(0.02)
        inside.remove(body)
        return [bytes(body)]

    async def read_all() -> list[list[Any]]:
        parsing = asyncio.Semaphore(1)
        requests = [Request(scope, receive(str(number))) for number in range(6)]
        return await asyncio.gather(
            *(bodies.read_images(one, Limits(), parsing) for one in requests)
        )

    def receive(body: str) -> Any:
        async def message() -> dict[str, Any]:
            return {"type": "http.request", "body": body.encode(), "more_body": False}

        return message

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    monkeypatch.setattr(bodies, "_parse", parse)
    assert asyncio.run(read_all()) == [[str(number).encode()] for number in range(6)]
    assert most == 1


def damaged(random: np.random.Generator) -> tuple[bytes, str]:
    """Return a body with some bytes changed, left out or doubled; the type as well, at times."""
    image = picture(int(random.integers(6)))
    body, kind = (form(image), FORM) if random.random() < 0.7 else (b"", JSON)
    if kind == JSON:
        body = json.dumps({"image": encoded(image)}).encode()
    for _ in range(random.integers(1, 6)):
        start, length = random.integers(len(body)), random.integers(1, 40)
        other = random.bytes(length) if random.random() < 0.5 else body[start : start + length] * 2
        body = body[:start] + other + body[start + (length if random.random() < 0.7 else 0) :]
    if random.random() < 0.1:
        letters = random.integers(32, 127, 30).astype(np.uint8).tobytes().decode()
        kind = kind[: random.integers(len(kind))] + letters
    return body, kind


def test_300_damaged_bodies_are_answered_or_refused(server: Server) -> None:
    random = np.random.default_rng(0)
    came = set()
    for _ in range(300):
        body, kind = damaged(random)
        status, answer, _ = send(server, body, kind)
        assert status in (200, 400, 413, 415, 422), (status, body[:300], kind)
        assert [*answer] == ["predictions" if status == 200 else "error"]
        came.add(status)
    assert came >= {200, 400, 415, 422}
