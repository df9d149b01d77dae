"""A thousand photos with every oddity that was met: each has its row, and nothing else ends."""

import io
import json
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from capt_deploy.cli.predict import main

BUNDLE = Path(__file__).parents[1] / "golden" / "tiny.capt"
PHOTOS = 1000
_PIXELS = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
_IMAGE = Image.fromarray(_PIXELS)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG, JPEG = encoded(_IMAGE, "PNG"), encoded(_IMAGE, "JPEG")


def png_with(name: bytes, body: bytes, place: int) -> bytes:
    """Return the PNG with a chunk more."""
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return PNG[:place] + struct.pack(">I", len(body)) + name + body + checksum + PNG[place:]


def array(values: object, kind: str) -> bytes:
    return encoded(Image.fromarray(np.asarray(values).reshape(16, 16)), kind)


_HEADER, _END = 33, len(PNG) - 12
READABLE: dict[str, Callable[[], bytes]] = {
    "short EXIF.png": lambda: png_with(b"eXIf", b"II*\0", _HEADER),
    "foreign EXIF.png": lambda: png_with(b"eXIf", b"\0\0\x11\0" + b"\0" * 40, _HEADER),
    "doubled EXIF.png": lambda: png_with(b"eXIf", b"Exif\0\0Exif\0\0II*\0\x08", _HEADER),
    "EXIF.webp": lambda: encoded(_IMAGE, "WEBP", exif=b"Exif\0\0II*\0"),
    "garbage.webp": lambda: encoded(_IMAGE, "WEBP", exif=b"Exif\0\0" + b"\xa6" * 64),
    "ICC behind the pixels.png": lambda: png_with(b"iCCP", b"icc\0", _END),
    "deep.png": lambda: array(np.arange(256, dtype=np.uint16) * 257, "PNG"),
    "CMYK.jpg": lambda: encoded(_IMAGE.convert("CMYK"), "JPEG"),
    "palette.gif": lambda: encoded(_IMAGE.quantize(16), "GIF"),
    "transparent.png": lambda: encoded(_IMAGE.convert("LA"), "PNG"),
    "turned.jpg": lambda: encoded(
        _IMAGE,
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ),
    "PNG inside.jpg": lambda: PNG,
    "line\nbreak.png": lambda: PNG,
    unicodedata.normalize("NFD", "é.png"): lambda: PNG,
}
UNREADABLE: dict[str, Callable[[], bytes]] = {
    "empty.png": lambda: b"",
    "text.png": lambda: b"no image",
    "cut.png": lambda: PNG[: len(PNG) // 2],
    "cut.jpg": lambda: JPEG[:20],
    "postscript.png": lambda: encoded(_IMAGE, "EPS"),
    "floats.tif": lambda: array(np.linspace(0, 1, 256, dtype=np.float32), "TIFF"),
    "labels.tif": lambda: array(np.linspace(0, 2**31 - 1, 256).astype(np.int32), "TIFF"),
    "tomograph.tif": lambda: array(np.linspace(-1000, 3000, 256).astype(np.int32), "TIFF"),
    "phone.jpg": lambda: b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + b"\0" * 500,
    "pointer.jpg": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "huge.png": lambda: PNG[:16] + struct.pack(">II", 2**30, 2**30) + PNG[24:],
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and names that are no text need POSIX")
def test_each_photo_of_an_odd_folder_has_its_row(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "archive", tmp_path / "photos"
    for place in (elsewhere, folder / "@eaDir" / "a.jpg", folder / "run"):
        place.mkdir(parents=True)
    for name, content in (READABLE | UNREADABLE).items():
        (folder / name).write_bytes(content())
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(PNG)
    (folder / "@eaDir" / "a.jpg" / "thumbnail.jpg").write_bytes(JPEG)
    for name in ("config.json", "split.json", "confusions.png"):
        (folder / "run" / name).write_bytes(PNG)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "self").symlink_to(".")
    (folder / "notes.txt").touch()
    (folder / "day").symlink_to(elsewhere)
    for number in range(PHOTOS - len(READABLE) - len(UNREADABLE) - 1):
        (elsewhere / f"{number}.jpg").write_bytes(JPEG)
    done = CliRunner().invoke(main, [str(BUNDLE), str(folder), "--json"])
    assert done.exit_code == 1, done.stderr  # some have errors
    rows = json.loads(done.stdout)
    assert len(rows) == len({row["path"] for row in rows}) == PHOTOS
    failed = {Path(row["path"]).name: row["error"] for row in rows if "error" in row}
    assert set(failed) == set(UNREADABLE)
    assert "HEIC" in failed["phone.jpg"] and "format that is known" in failed["postscript.png"]
    for name in ("pipe.png", "gone.png", "self", "@eaDir", "run", ".txt (1)"):
        assert name in done.stderr
