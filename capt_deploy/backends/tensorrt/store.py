"""From a graph to its engine: which one it is, from the cache where it is there, else built."""

import hashlib
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from threading import Event
from typing import TypeVar

from capt_deploy.backends.batch_sizes import BATCHES, check_batches
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import Timings, build_engine, load_library
from capt_deploy.backends.tensorrt.entry import EngineKey
from capt_deploy.backends.tensorrt.progress import cancellable
from capt_deploy.bundle.graphs import StoredGraph, read_metadata
from capt_deploy.bundle.manifest import Manifest
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.files import sha256_file, visible_files

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """The GPU that an engine is for."""

    sm: int  # compute capability, 89 for 8.9
    gpu: str = ""  # its name; unknown where it is in another machine
    driver: str = ""
    active: Callable[[], AbstractContextManager[None]] = nullcontext  # makes it a thread's GPU


def key_of(
    graph: StoredGraph, library: str, target: Target, batches: tuple[int, int, int] = BATCHES
) -> EngineKey:
    """Return the key of an engine; the graph is hashed, and its weights in other files.

    TensorRT times kernels on one GPU under one driver. TensorRT-RTX compiles for all GPUs of a
    compute capability and finishes the work where the engine is loaded, so that engines may be
    built elsewhere: neither the GPU's name nor the driver makes them others.

    Raises:
        BackendError: the library cannot be used here, or these are no batches.
    """
    check_batches(batches)
    return EngineKey(
        library=library,
        version=load_library(library).__version__,
        platform=f"{sys.platform}-{platform.machine()}",
        sm=target.sm,
        gpu=target.gpu if library == "tensorrt" else "",
        driver=target.driver if library == "tensorrt" else "",
        onnx=hashlib.sha256(graph.onnx).hexdigest(),
        weights=_hash_weights(graph),
        precision=graph.precision,
        batches=batches,
    )


def obtain(
    cache: EngineCache,
    key: EngineKey,
    graph: StoredGraph,
    target: Target,
    load: Callable[[bytes], T | None],
) -> T:
    """Return what `load` makes of the engine; one that it returns None for is built again.

    Raises:
        BackendError: the library cannot build the graph for that GPU.
        KeyboardInterrupt: Ctrl-C was pressed meanwhile; nothing is kept.
    """
    return cache.obtain(key, lambda: _build(cache, key, graph, target), load)


def _build(cache: EngineCache, key: EngineKey, graph: StoredGraph, target: Target) -> bytes:
    of_rtx = key.library == "tensorrt_rtx"
    say(f"{key.library} {key.version}: building an engine for SM {key.sm}, once; {cache.folder}")
    # What is measured for one graph also serves others on the same GPU.
    shared = replace(key, kind="timing", onnx="", weights="", precision="", batches=())
    timings = None if of_rtx else Timings(cache.read(shared) or b"")
    first, usual, last = key.batches

    def build(cancelled: Event) -> bytes:
        with target.active():
            return build_engine(
                graph.onnx,
                library=key.library,
                sm=key.sm if of_rtx else None,
                batches=(first, usual, last),
                weights_folder=graph.weights_folder,
                timings=timings,
                cancelled=cancelled,
            )

    engine = cancellable(build)
    if timings is not None and timings.data:
        cache.write(shared, timings.data)
    return engine


def _hash_weights(graph: StoredGraph) -> str:
    """Return a SHA-256 of the weights that are not in the graph's own file, if there are some."""
    if graph.weights_folder is None:
        return ""
    text = read_metadata(graph.onnx)
    graphs = Manifest.from_json(text, "the graph").graphs if text is not None else {}
    try:
        if graph.precision in graphs:
            name = graphs[graph.precision].weights
            return "" if name is None else sha256_file(graph.weights_folder / name)
        # Not from capt-export: any of the files may hold some.
        hashes = [sha256_file(path) for path in visible_files(graph.weights_folder)]
    except OSError as cause:
        raise BackendError(f"expected the graph's weights, came {cause}") from cause
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
