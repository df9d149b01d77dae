"""The server as its clients meet it: a process of its own, real sockets, bodies of all kinds."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.server_load import Server, is_right, load, post_file, running_server
from capt_deploy.classifier import Classifier
from tests.conftest import COLOURS

JSON, FORM = "application/json", "multipart/form-data; boundary=edge"
Answer = tuple[int, Any, dict[str, str]]


def picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    size = (*random.integers(8, 90, 2), 3)
    colour = list(COLOURS.values())[seed % 4]
    pixels = random.normal(colour, 60, size).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, ("PNG", "JPEG", "WEBP")[seed % 3])
    return file.getvalue()


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def form(*images: bytes, end: bytes = b"--edge--\r\n") -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + end


def send(
    server: Server, body: bytes | str, kind: str | None, path: str = "/predict", **headers: str
) -> Answer:
    connection = server.connect()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if kind is not None:
        given["Content-Type"] = kind
    connection.request("POST", path, body.encode() if isinstance(body, str) else body, given)
    return read(connection)


def read(connection: HTTPConnection) -> Answer:
    with connection.getresponse() as response:
        answer = json.loads(response.read())
        return response.status, answer, dict(response.headers)


def get(server: Server, path: str) -> tuple[int, str]:
    connection = server.connect()
    connection.request("GET", path)
    with connection.getresponse() as response:
        return response.status, response.read().decode()


@pytest.fixture(scope="module")
def server(server_extra: None, golden: Path) -> Iterator[Server]:
    with running_server(golden, "--max-bytes", 300_000, "--max-seconds", 20) as running:
        yield running
        assert running.process.poll() is None
        assert "Traceback" not in running.log.read_text()


def test_200_concurrent_requests_lose_none_and_get_none_wrong(
    server: Server, classifier: Classifier
) -> None:
    pictures = [picture(seed) for seed in range(200)]
    expected = [classifier(one) for one in pictures]
    nearest = min(
        np.abs(one.probabilities - other.probabilities).max()
        for number, one in enumerate(expected)
        for other in expected[:number]
    )
    assert nearest > 1e-6, "two pictures with one answer would hide that they were mixed up"
    row = load(server, pictures, expected, clients=200, each=1)
    assert (row["requests"], row["lost"], row["wrong"]) == (200, 0, 0)


def test_a_wrong_answer_is_noticed(classifier: Classifier) -> None:
    one, other = classifier(picture(0)), classifier(picture(1))
    top = [{"label": label, "probability": share} for label, share in other.top(4)]
    answer = {"predictions": [{"label": other.label, "top": top}]}
    assert is_right(200, answer, other)
    assert not is_right(200, answer, one)
    assert not is_right(503, answer, other)


def test_json_and_forms_hold_one_image_or_several_in_order(
    server: Server, classifier: Classifier
) -> None:
    pictures = [picture(seed) for seed in range(4)]
    labels = [classifier(one).label for one in pictures]
    assert len({*labels}) > 1
    many = json.dumps({"images": [encoded(one) for one in pictures]})
    for body, kind in ((form(*pictures), FORM), (many, JSON)):
        status, answer, _ = send(server, body, kind, "/predict?top_k=2")
        assert status == 200
        assert [one["label"] for one in answer["predictions"]] == labels
        for one, image in zip(answer["predictions"], pictures, strict=True):
            top = [(part["label"], part["probability"]) for part in one["top"]]
            assert top == [
                (label, pytest.approx(p, abs=1e-5)) for label, p in classifier(image).top(2)
            ]
            assert one["confidence"] == top[0][1]
    status, answer, _ = send(server, json.dumps({"image": encoded(pictures[0])}), JSON)
    assert (status, answer["predictions"][0]["label"]) == (200, labels[0])


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
    "deep JSON": (400, "not valid JSON", "[" * 100_000, JSON),
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
    "no ASCII": (400, "image 0: not valid base64", '{"image": "\\ud800é"}', JSON),
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


def test_what_else_is_wrong_with_a_request(server: Server) -> None:
    assert send(server, form(GOOD), FORM, Content_Encoding="gzip")[0] == 415
    status, answer, _ = send(server, form(GOOD), FORM, "/predict?top_k=0")
    assert (status, answer["error"][:6]) == (422, "top_k:")
    assert send(server, form(GOOD), FORM, "/predict?top_k=many")[0] == 422
    assert send(server, form(GOOD), FORM, "/nothing")[0] == 404
    assert get(server, "/predict")[0] == 405


def test_a_client_that_leaves_in_the_middle_harms_nobody(server: Server) -> None:
    before = count(server, 'capt_requests_total{status="400"}')
    with socket.create_connection((server.host, server.port)) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\nContent-Length: 999"
        client.sendall(f"{head}\r\n\r\n".encode() + form(GOOD)[:99])
    deadline = time.monotonic() + 10
    while count(server, 'capt_requests_total{status="400"}') == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert post_file(server.connect(), GOOD)[0] == 200


def count(server: Server, name: str) -> float:
    lines = get(server, "/metrics")[1].splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)


def test_the_metrics_count_what_happened(server: Server, classifier: Classifier) -> None:
    label = classifier(GOOD).label
    names = (
        'capt_requests_total{status="200"}',
        'capt_requests_total{status="422"}',
        "capt_request_seconds_count",
        "capt_batch_size_sum",
        "capt_confidence_count",
        f'capt_predicted_total{{label="{label}"}}',
    )
    before = [count(server, name) for name in names]
    send(server, form(GOOD, GOOD, GOOD), FORM)
    send(server, form(GOOD), FORM)
    send(server, "{}", JSON)
    after = [count(server, name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 1, 3, 4, 4, 4]
    assert (
        'capt_info{backend="onnxruntime",device="cpu",precision="fp32"'
        in get(server, "/metrics")[1]
    )
    assert count(server, "capt_waiting_images") == 0


def test_the_health_says_what_runs(server: Server) -> None:
    status, text = get(server, "/healthz")
    health = json.loads(text)
    assert (status, health["status"], health["backend"]) == (200, "ok", "onnxruntime")
    assert health["classes"] == 4


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    connection = server.connect()
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "http" not in page
    assert "src=" not in page
