"""Photos of all kinds that the C++ example reads."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

WHOLE = ((0, 0, 1, 1),)
# First column and row, and steps to the next ones, of the passes of an interlaced PNG.
PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(
    path: Path,
    size: tuple[int, int],
    depth: int,
    colour: int,
    *between: bytes,
    passes: Sequence[tuple[int, int, int, int]] = WHOLE,
) -> None:
    """Write a PNG of random values, of a kind that Pillow does not write."""
    width, height = size
    rng, rows = np.random.default_rng(depth + colour), b""
    for left, top, across, down in passes:
        columns, lines = -((left - width) // across), -((top - height) // down)
        row = -(-columns * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8)
        values = rng.integers(0, 256, (lines, row), np.uint8)
        rows += b"".join(b"\0" + line.tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, len(passes) > 1)
    chunks = [chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(rows))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))


def smooth(width: int, height: int, bands: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return noise that a JPEG does not lose altogether, 0-255."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, bands), np.uint8)
    parts = [Image.fromarray(small[:, :, band]).resize((width, height)) for band in range(bands)]
    return np.stack([np.asarray(part) for part in parts], axis=2)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.ImageDescription] = "a photo"
    data[ExifTags.Base.Orientation] = orientation
    return data


def write_odd_photos(folder: Path) -> None:
    """Write photos of all kinds that the program reads."""
    photo = Image.fromarray(smooth(53, 37))
    grey, alpha = photo.convert("L"), Image.fromarray(smooth(53, 37, 1, seed=2)[:, :, 0])
    for orientation in range(1, 10):  # there is no 9
        photo.save(folder / f"turned{orientation}.jpg", exif=exif(orientation))
    photo.save(folder / "turned.png", exif=exif(6))
    photo.save(folder / "broken-exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        name = subsampling.replace(":", "")
        photo.save(folder / f"{name}.jpg", subsampling=subsampling, quality=80)
    photo.save(folder / "progressive.jpg", progressive=True)
    grey.save(folder / "grey.jpg")
    Image.fromarray(smooth(53, 37, 4), "CMYK").save(folder / "cmyk.jpg")
    for width, height in ((1, 1), (3, 200), (24, 24), (1000, 700)):
        Image.fromarray(smooth(width, height)).save(folder / f"{width}x{height}.jpg")
    Image.new("L", (1, 120_000), 90).save(folder / "strip.png")
    photo.save(folder / "rgb.png")
    grey.save(folder / "grey.png")
    photo.quantize(50).save(folder / "palette.png", transparency=3)
    alpha.convert("1").save(folder / "two-levels.png")
    Image.merge("RGBA", [*photo.split(), alpha]).save(folder / "rgba.png")
    Image.merge("LA", [grey, alpha]).save(folder / "grey-alpha.png")
    size = (41, 29)
    for depth, colour in ((2, 0), (4, 0), (16, 0), (16, 2), (16, 4), (16, 6)):
        write_png(folder / f"{depth}-bits-{colour}.png", size, depth, colour)
    write_png(folder / "key-colour.png", size, 8, 2, chunk(b"tRNS", bytes(6)))
    for depth in (1, 2, 4, 8):  # most values of the last two are not in the palette
        palette = chunk(b"PLTE", bytes(range(40, 46 if depth == 1 else 52)))
        write_png(folder / f"{depth}-bits-palette.png", size, depth, 3, palette)
    write_png(folder / "interlaced-palette.png", size, 4, 3, palette, passes=PASSES)
    for depth, colour in ((1, 0), (16, 0), (8, 2), (16, 6)):
        write_png(folder / f"interlaced-{colour}-{depth}.png", size, depth, colour, passes=PASSES)
