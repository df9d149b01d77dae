"""How large a report gets, and how long it takes on one core.

    python -m benchmarks.report [--images 10000] [--classes 100]

Answers of five models are random numbers around the truth, as `capt-eval` has them for a run with
its bundles; images are the photos of ../shared/data/cifar100 over and over, or none where these
are not here.
"""

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import describe, load_average, write_result
from capt_deploy.core.files import visible_files
from capt_deploy.report import Answers, ReportData, write_report

_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "cifar100" / "test"
_MODELS = ("zero-shot", "tuned", "exported fp32", "exported fp16", "exported int8")
_SEED = 0


@click.command()
@click.option("--images", default=10_000, show_default=True)
@click.option("--classes", default=100, show_default=True)
@click.option("--record/--no-record", default=True, help="Write results/report.json.")
def main(images: int, classes: int, record: bool) -> None:
    """Measure, print and write results/report.json."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    row = measure(synthetic(images, classes))
    click.echo(json.dumps(row, indent=2))
    if record:
        write_result("report", {**describe(), "load": load_average(), "seed": _SEED, **row})


def synthetic(images: int, classes: int) -> ReportData:
    """Return answers that are right for about half of the images; half of the classes are new."""
    rng = np.random.default_rng(_SEED)
    labels = rng.integers(0, classes, images)
    photos = visible_files(_PHOTOS) if _PHOTOS.is_dir() else [Path("missing.png")]
    shared = rng.normal(0, 1, (images, classes))  # models agree about what is hard
    shared[np.arange(images), labels] += 2.5
    factors = np.where(np.arange(classes) < classes // 2, 1, 0.95)
    models = []
    for name in _MODELS:
        logits = shared + rng.normal(0, 0.3, shared.shape)
        own = None if name == "zero-shot" else factors
        models.append(Answers(name, logits / 0.7, 0.7, own))
    return ReportData(
        f"{images:,} images of {classes:,} classes",
        [photos[row % len(photos)] for row in range(images)],
        labels,
        [f"class number {index}" for index in range(classes)],
        [index < classes // 2 for index in range(classes)],
        models,
        [(index, index + 1) for index in range(0, classes // 2, 2)],
        {"seed": _SEED, "images": images, "classes": classes},
    )


def measure(data: ReportData) -> dict[str, Any]:
    """Return seconds, and bytes of each file."""
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        write_report(data, Path(folder) / "report")
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        sizes = {file.name: file.stat().st_size for file in Path(folder).rglob("report.*")}
    return {
        "images": len(data.labels),
        "classes": len(data.class_names),
        "models": len(data.models),
        "photos": data.files[0].exists(),
        "cores": 1 if hasattr(os, "sched_setaffinity") else os.cpu_count(),
        "seconds": wall,
        "processor_seconds": processor,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # KiB on Linux
        "bytes": sizes,
    }


if __name__ == "__main__":
    main()
