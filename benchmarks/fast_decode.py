"""JPEG to pixels: as open_clip does it, with `fast_decode`, and decoded by simplejpeg instead.

    pip install simplejpeg
    python -m benchmarks.fast_decode

Times are the least CPU time of many runs in turns, on one thread. simplejpeg wraps libjpeg-turbo,
as Pillow does, and can let the decoder shrink as well; it is no part of capt.
"""

import io
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.bench.images import synthetic_photos
from capt_deploy.core.console import Command, say, table
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

Pixels = NDArray[np.uint8]
_CONFIG = PreprocessConfig((224, 224), (0.5,) * 3, (0.5,) * 3)
_SIZES = ((500, 375), (1600, 1200), (4000, 3000))  # pixels, width and height
_HALF = 448  # pixels to which `fast_decode` lets the decoder shrink, at least


def photo(size: tuple[int, int]) -> bytes:
    """Return a synthetic photo of some size, as a JPEG."""
    small = Image.open(io.BytesIO(synthetic_photos(1).encoded[0]))
    noise = np.random.default_rng(0).normal(0, 5, (size[1], size[0], 3))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)) + noise
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _with_simplejpeg(least_side: int, data: bytes) -> Pixels:
    from simplejpeg import decode_jpeg

    return preprocess(
        decode_jpeg(data, "RGB", min_height=least_side, min_width=least_side), _CONFIG
    )


@click.command(cls=Command)
@click.option("--rounds", default=30, show_default=True)
def main(rounds: int) -> None:
    """Print milliseconds, and by how much pixels differ from open_clip's, 0-255."""
    ways: dict[str, Callable[[bytes], Pixels]] = {
        "Pillow": partial(preprocess, config=_CONFIG),
        "Pillow, fast_decode": partial(preprocess, config=_CONFIG, fast_decode=True),
    }
    if find_spec("simplejpeg") is None:
        say("simplejpeg is not installed, and not measured")
    else:
        ways["simplejpeg"] = partial(_with_simplejpeg, 0)  # 0: whole
        ways["simplejpeg, shrunk"] = partial(_with_simplejpeg, _HALF)
    rows = []
    for size in _SIZES:
        data = photo(size)
        exact = ways["Pillow"](data).astype(int)
        least = dict.fromkeys(ways, np.inf)
        for _ in range(rounds):
            for name, way in ways.items():
                before = time.process_time()
                way(data)
                least[name] = min(least[name], time.process_time() - before)
        for name, way in ways.items():
            differences = np.abs(way(data).astype(int) - exact)
            figures = (
                f"{1000 * least[name]:.2f}",
                f"{differences.mean():.2f}",
                f"{differences.max()}",
            )
            rows.append([f"{size[0]}x{size[1]}", name, *figures])
    click.echo(table(["JPEG", "decoded by", "ms", "mean difference", "largest"], rows))


if __name__ == "__main__":
    main()
