"""Compare the answers of the C++ example with the package's own, photo by photo.

    capt-train --data DATA --model MODEL --method rows --out run
    capt-export run --out photos.capt --fp32
    python -m benchmarks.cpp build/capt_classify photos.capt DATA/test

The program is built as examples/cpp/README.md says. Both label one photo at a time with ONNX
Runtime on the CPU; the milliseconds hold decoding, and those of the program its start.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from capt_deploy.backends.spec import ONNXRUNTIME_CPU
from capt_deploy.core.console import Command, PathInHome, print_json
from capt_deploy.core.errors import BackendError
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.labelling import find_images


@click.command(cls=Command)
@click.argument("program", type=PathInHome(exists=True))
@click.argument("bundle", type=PathInHome())
@click.argument("paths", nargs=-1, required=True)
def main(program: Path, bundle: Path, paths: tuple[str, ...]) -> None:
    """Label photos (PATHS) with a BUNDLE and the built PROGRAM, and compare the answers."""
    print_json(compare(program, bundle, find_images(paths)))


def compare(program: Path, bundle: Path, photos: Sequence[str]) -> dict[str, Any]:
    """Return how many answers differ, the largest difference of a probability, and times.

    Raises:
        BackendError: the program fails, or cannot read a photo.
        ImageError: the package cannot.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [str(program), str(bundle), *photos], capture_output=True, text=True, check=False
    )
    cpp_seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(lines) != len(photos):
        errors = [line["error"] for line in lines if "error" in line]
        raise BackendError(f"{program} failed: {'; '.join([*errors, done.stderr])}")
    classifier = Classifier.load(bundle, ONNXRUNTIME_CPU.name, "fp32")
    start = time.perf_counter()
    predictions = [classifier(photo) for photo in photos]
    seconds = time.perf_counter() - start
    pairs = list(zip(lines, predictions, strict=True))
    return {
        "photos": len(photos),
        "labels": len({prediction.label for prediction in predictions}),
        "other_labels": sum(line["label"] != one.label for line, one in pairs),
        "largest_difference": max(
            float(np.abs(np.array(line["probabilities"]) - one.probabilities).max())
            for line, one in pairs
        ),
        "cpp_ms": round(1000 * cpp_seconds / len(photos), 2),
        "package_ms": round(1000 * seconds / len(photos), 2),
    }


if __name__ == "__main__":
    main()
