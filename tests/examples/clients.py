"""What clients send to the server, and how they read what comes back."""

import base64
import io
import json
from http.client import HTTPConnection
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.server_load import Server
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


def count(server: Server, name: str) -> float:
    lines = get(server, "/metrics")[1].splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)
