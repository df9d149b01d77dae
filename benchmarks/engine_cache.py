"""Time the second load of a bundle, from the engine cache, with engines of TensorRT-RTX.

    python -m benchmarks.random_models ViT-B-16 model PHOTOS
    capt-train --data PHOTOS --model local-dir:model --classes all --method zeroshot --out run
    capt-export run --out vit.capt --fp32 --fp16
    python -m benchmarks.engine_cache vit.capt

Each sample is a new process that does what a load does up to the bytes that are handed to the
library: read the bundle and check it, hash the graph for its key, read the engine and check it.
Importing the library and deserialising are not measured; nothing runs, so no GPU is needed.
Half of the samples are taken after the files were dropped from the page cache, as after a restart.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.record import describe, write_result
from capt_deploy.backends.spec import TENSORRT_RTX
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import load_library
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.console import Command, PathInHome, say, table

_SHOWN = ("bundle", "key", "engine", "all", "cpu", "slowest")
SM = 89


@click.command(cls=Command)
@click.argument("bundle", type=PathInHome())
@click.option("--samples", default=10, show_default=True, type=click.IntRange(2))
@click.option("--sample", "cache", type=PathInHome(), hidden=True)
@click.option("--precision", hidden=True)
def main(bundle: Path, samples: int, cache: Path | None, precision: str | None) -> None:
    """Build the engines of a BUNDLE, load them again, and print what that took."""
    if cache is not None and precision is not None:
        click.echo(json.dumps(load(bundle, precision, EngineCache(cache))))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for graph in open_bundle(bundle).manifest.graphs:
            rows[graph] = _measure(bundle, graph, Path(folder), samples)
    library = f"{TENSORRT_RTX.module} {load_library(TENSORRT_RTX).__version__}"
    write_result("engine_cache", {"library": library, **describe(), "cells": rows})
    click.echo(_table(rows))


def load(path: Path, precision: str, cache: EngineCache) -> dict[str, float]:
    """Return the seconds of each part of a load from the cache."""
    load_library(TENSORRT_RTX)
    used, times = time.process_time(), [time.perf_counter()]
    bundle = open_bundle(path)
    graph = bundle.graph(precision)
    times.append(time.perf_counter())
    key = EngineRequest(graph, TENSORRT_RTX, SM).key
    times.append(time.perf_counter())
    engine = cache.read(key)
    times.append(time.perf_counter())
    if engine is None:
        raise click.ClickException(f"{cache.folder}: the engine is not there")
    parts = [later - earlier for earlier, later in pairwise(times)]
    whole = {"all": times[-1] - times[0], "cpu": time.process_time() - used}
    return {"bundle": parts[0], "key": parts[1], "engine": parts[2], **whole}


def _measure(path: Path, precision: str, folder: Path, samples: int) -> dict[str, Any]:
    cache, graph = EngineCache(folder), open_bundle(path).graph(precision)
    request = EngineRequest(graph, TENSORRT_RTX, SM)
    start = time.perf_counter()
    engine = request.obtain(cache, lambda data: data)
    built = time.perf_counter() - start
    say(f"{precision}: built in {built:.1f} s")
    files = [cache.path_of(request.key), *(file for file in path.rglob("*") if file.is_file())]
    cold: list[dict[str, float]] = []
    warm: list[dict[str, float]] = []
    for number in range(samples):
        if number % 2 == 0:
            _drop(files)
        (warm if number % 2 else cold).append(_sample(path, precision, folder))
    return {
        "graph_bytes": len(graph.onnx),
        "engine_bytes": len(engine),
        "build_s": built,
        "warm_s": _summary(warm),
        "cold_s": _summary(cold),
    }


def _sample(path: Path, precision: str, folder: Path) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.engine_cache", str(path)]
    words += ["--sample", str(folder), "--precision", precision]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    parts: dict[str, float] = json.loads(done.stdout)
    return parts


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median of each part and the slowest whole."""
    parts = {name: median(sample[name] for sample in samples) for name in samples[0]}
    return {**parts, "slowest": max(sample["all"] for sample in samples), "samples": len(samples)}


def _drop(files: list[Path]) -> None:
    """Drop files from the page cache, as far as the system lets one."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("second load", "graph, MB", "engine, MB", "build, s", "bundle", "key", "engine, s")
    lines = []
    for precision, row in rows.items():
        sizes = (f"{row['graph_bytes'] / 1e6:.0f}", f"{row['engine_bytes'] / 1e6:.0f}")
        for kind in ("warm", "cold"):
            parts = [f"{row[f'{kind}_s'][name]:.2f}" for name in _SHOWN]
            lines.append((f"{precision}, {kind}", *sizes, f"{row['build_s']:.1f}", *parts))
    return table((*header, "all, s", "CPU, s", "slowest"), lines)


if __name__ == "__main__":
    main()
