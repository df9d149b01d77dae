"""What `fast_decode` gains and what it changes, on real photos saved as large JPEGs.

    python -m benchmarks.fast_decode BUNDLE [--photos 32]

The photos are those of ../shared/data/cifar100. There are two kinds of JPEG of each: one enlarged,
as smooth as a blurred photo, and a mosaic of hundreds of them at their own size, which has more
fine detail than any camera's. Exact and fast decoding take turns on each.
"""

import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.record import describe, write_result
from capt_deploy.core.files import visible_files
from capt_deploy.data.preprocess import PreprocessConfig, preprocess
from capt_deploy.serving.classifier import Classifier

_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "cifar100" / "test"
_CAMERAS = ((1920, 1080), (4032, 3024))  # width, height of 2 and 12 megapixels
_INPUTS = (224, 336)  # pixels, of common models; the bundle's own comes first
_QUALITY = 90
_TILES = 500  # photos of a mosaic
_SEED = 0


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--photos", "count", default=32, show_default=True)
def main(bundle: Path, count: int) -> None:
    """Measure, print and write results/fast_decode.json."""
    files = visible_files(_PHOTOS)
    rng = np.random.default_rng(_SEED)
    chosen = [files[index] for index in rng.choice(len(files), count, replace=False)]
    rows = []
    with Classifier.load(bundle, "onnxruntime-cpu") as classifier:
        own = classifier.manifest.preprocess
        configs = [own, *(PreprocessConfig((s, s), own.mean, own.std) for s in _INPUTS)]
        for size in _CAMERAS:
            jpegs = {
                "enlarged": [_enlarged(file, size) for file in chosen],
                "mosaic": [_mosaic(files, rng, size) for _ in range(max(1, count // 8))],
            }
            for kind, photos in jpegs.items():
                for config in configs:
                    asked = classifier if config is own and kind == "enlarged" else None
                    about = {"kind": kind, "jpeg": list(size), "input": config.size[0]}
                    rows.append(about | _measure(photos, config, asked))
                    click.echo(json.dumps(rows[-1]))
    model = {name: classifier.manifest.training.get(name) for name in ("model", "method")}
    write_result("fast_decode", {**describe(), "model": model, "seed": _SEED, "rows": rows})


def _measure(
    photos: list[bytes], config: PreprocessConfig, classifier: Classifier | None
) -> dict[str, Any]:
    """Return times in milliseconds of one thread, and differences of pixels from 0 to 255."""
    times: dict[bool, list[float]] = {False: [], True: []}
    means, largest, same, changes = [], [], [], []
    for photo in photos:
        pixels = {}
        for fast in (False, True):
            start = time.perf_counter()
            pixels[fast] = preprocess(photo, config, fast_decode=fast)
            times[fast].append(1000 * (time.perf_counter() - start))
        difference = np.abs(pixels[True].astype(int) - pixels[False])
        means.append(float(difference.mean()))
        largest.append(int(difference.max()))
        if classifier is not None:
            one, other = classifier.run(np.stack([pixels[False], pixels[True]]))
            same.append(one.label == other.label)
            changes.append(float(np.abs(one.probabilities - other.probabilities).max()))
    exact, fast_one = (statistics.median(times[fast]) for fast in (False, True))
    return {
        "photos": len(photos),
        "exact_ms": exact,
        "fast_ms": fast_one,
        "speedup": exact / fast_one,
        "mean_difference": statistics.mean(means),
        "largest_difference": max(largest),
        "same_label": statistics.mean(same) if same else None,
        "largest_change_of_a_probability": max(changes, default=None),
    }


def _enlarged(file: Path, size: tuple[int, int]) -> bytes:
    return _jpeg(_open(file).resize(size, Image.Resampling.BICUBIC))


def _mosaic(files: list[Path], rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    mosaic = Image.new("RGB", size)
    images = [_open(files[index]) for index in rng.choice(len(files), _TILES, replace=False)]
    for y in range(0, size[1], 32):
        for x in range(0, size[0], 32):
            mosaic.paste(images[rng.integers(_TILES)], (x, y))
    return _jpeg(mosaic)


def _open(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
