"""Read the images of a request's body, or raise a `RefusedError` with its HTTP status.

400: the body cannot be parsed. 408: it comes too slowly. 413: the body, or an image, is too large.
415: the body has another type, or holds no image of a type that is read. 422: the body can be
parsed, but does not hold what is expected.
"""

import asyncio
import base64
import binascii
import json
import warnings
from typing import NamedTuple

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.requests import ClientDisconnect

from capt_deploy.data.images import open_image
from examples.server.limits import Limits, RefusedError

# Fewer than Pillow reads: its EPS reader, for example, starts another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")
_EXPECTED = (
    'multipart/form-data with files, or application/json with {"image": "BASE64"} or '
    '{"images": ["BASE64", …]}'
)

_BRACKETS = 8  # of JSON; the right form has two at most, and base64 none
_PIECE = 2**16  # bytes, of a form

_BASE64 = {"type": "string", "format": "byte"}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_EITHER = [{"image": _BASE64}, {"images": {"type": "array", "items": _BASE64}}]
BODY = {  # for OpenAPI
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": {"image": _FILES}}},
            "application/json": {
                "schema": {"oneOf": [{"type": "object", "properties": keys} for keys in _EITHER]}
            },
        },
    }
}


class EncodedImage(NamedTuple):
    """An image as it came, and how many pixels its header declares."""

    data: bytes
    pixels: int


async def read_images(
    request: Request, limits: Limits, parsing: asyncio.Semaphore
) -> list[EncodedImage]:
    """Return the encoded images of a request, at least one.

    `parsing` is common to all requests: a body takes several times its size while it is parsed.

    Raises:
        RefusedError: see above.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind not in (b"multipart/form-data", b"application/json"):
        came = kind.decode("latin-1") or "no content type"
        raise RefusedError(415, f"expected {_EXPECTED}; came {came}")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RefusedError(415, f"expected a body without content encoding, came {encoding}")
    body = await _read(request, limits)
    boundary = options.get(b"boundary") if kind == b"multipart/form-data" else None
    if kind == b"multipart/form-data" and not boundary:
        raise RefusedError(400, "the content type multipart/form-data names no boundary")
    async with parsing:
        return await asyncio.to_thread(_parse, body, boundary, limits)


async def _read(request: Request, limits: Limits) -> bytearray:
    """Return the body; its length is checked as declared, and again as it comes."""
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        raise RefusedError(400, "expected one length of the body, came Content-Length and chunks")
    too_large = RefusedError(413, f"expected a body of at most {limits.body_bytes} bytes")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    body = bytearray()

    async def fill() -> None:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limits.body_bytes:
                raise too_large
            body.extend(chunk)

    try:
        await asyncio.wait_for(fill(), limits.seconds)  # asyncio.timeout needs Python 3.11
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the body was not here within {limits.seconds:g} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "the connection ended before the body did") from None
    return body


def _parse(body: bytearray, boundary: bytes | None, limits: Limits) -> list[EncodedImage]:
    images = _from_json(body, limits) if boundary is None else _from_form(body, boundary, limits)
    return [
        EncodedImage(image, _count_pixels(image, number, limits))
        for number, image in enumerate(images)
    ]


def _from_json(body: bytearray, limits: Limits) -> list[bytes]:
    # Each part becomes an object, more than 20 times as large as in the body.
    if body.count(b"{") + body.count(b"[") > _BRACKETS:
        raise RefusedError(422, f"expected {_EXPECTED}; came JSON of more parts")
    if body.count(b",") > limits.images:
        raise _too_many(limits)
    try:
        value = json.loads(body.decode("ascii"))  # one byte a character in memory
    except ValueError as cause:
        raise RefusedError(400, f"not valid JSON: {cause}") from None
    match value:
        case {"image": str(text), **others} if not others:
            texts = [text]
        case {"images": [_, *_] as texts, **others} if not others:
            pass
        case _:
            raise RefusedError(422, f"expected {_EXPECTED}; came other JSON")
    if len(texts) > limits.images:
        raise _too_many(limits)
    return [_from_base64(text, number) for number, text in enumerate(texts)]


def _from_base64(text: object, number: int) -> bytes:
    if not isinstance(text, str):
        raise RefusedError(422, f"image {number}: expected a string of base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RefusedError(400, f"image {number}: not valid base64: {cause}") from None


def _from_form(body: bytearray, boundary: bytes, limits: Limits) -> list[bytes]:
    images: list[bytes] = []
    parts = 0
    whole = False

    def on_part(part: object) -> None:
        nonlocal parts
        parts += 1  # other fields are ignored, but cost time
        if parts > limits.images:
            raise _too_many(limits)
        if isinstance(part, File):
            part.file_object.seek(0)
            images.append(part.file_object.read())
            part.close()

    def on_end() -> None:
        nonlocal whole
        whole = True

    in_memory = {"MAX_MEMORY_FILE_SIZE": float("inf")}
    try:
        parser = FormParser(
            "multipart/form-data", on_part, on_part, on_end, boundary, config=in_memory
        )
        with memoryview(body) as view:
            for start in range(0, len(body), _PIECE):
                parser.write(bytes(view[start : start + _PIECE]))
        parser.finalize()
    except FormParserError as cause:
        raise RefusedError(400, f"not valid multipart/form-data: {cause}") from None
    if not whole:
        raise RefusedError(400, "the multipart body ends before its last boundary")
    if not images:
        raise RefusedError(422, "expected at least one file in the form, came none")
    return images


def _too_many(limits: Limits) -> RefusedError:
    return RefusedError(413, f"expected at most {limits.images} images in a request")


def _count_pixels(image: bytes, number: int, limits: Limits) -> int:
    """Return the pixels of an image by its header, and refuse what is not to be decoded."""
    foreign = RefusedError(415, f"image {number}: not an image of the types {', '.join(FORMATS)}")
    too_large = RefusedError(413, f"image {number}: expected at most {limits.pixels} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is stricter
            with open_image(image) as header:
                (width, height), kind = header.size, header.format
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        raise foreign from None
    except Exception as cause:  # Pillow's readers report damaged headers in many ways
        raise RefusedError(422, f"image {number}: damaged image ({cause})") from None
    if kind not in (*FORMATS, "MPO"):  # several JPEGs, of which the first is read
        raise foreign
    if width * height > limits.pixels:
        raise too_large
    return width * height
