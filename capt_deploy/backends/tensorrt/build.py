"""From a graph to its engine, which is read from the cache or built."""

import hashlib
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Event
from typing import TypeVar

from capt_deploy.backends.device import Device
from capt_deploy.backends.options import BATCHES
from capt_deploy.backends.spec import BackendSpec
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import build_engine, load_library
from capt_deploy.backends.tensorrt.key import AMPERE, EngineKey
from capt_deploy.bundle.graphs import StoredGraph, read_metadata
from capt_deploy.bundle.manifest import Manifest
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.files import sha256_file
from capt_deploy.core.jetson import jetson_linux

T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is built from and for."""

    graph: StoredGraph
    spec: BackendSpec  # with `builds_engines`
    sm: int  # compute capability of the GPU, 89 for 8.9
    batches: tuple[int, int, int] = BATCHES  # smallest, usual, largest
    device: Device | None = None  # the GPU; None if it is in another machine
    portable: str = ""  # one of `PORTABLE`: what may differ where the engine runs

    def __post_init__(self) -> None:
        """Check that such an engine can be built here.

        Raises:
            BackendError: the engine cannot be portable in this way.
        """
        if self.portable and self.spec.portable_engines:
            raise BackendError(
                f"every engine of {self.spec.name} is portable; leave --portable out"
            )
        if self.portable == "hardware" and jetson_linux() is not None:
            raise BackendError(
                "TensorRT builds no engine for other hardware on a Jetson; leave --portable out"
            )
        if self.portable == "hardware" and self.sm < AMPERE:
            raise BackendError(
                f"engines for other hardware need SM {AMPERE} (Ampere) or later, came SM {self.sm}"
            )

    @property
    def key(self) -> EngineKey:
        """Return the key of the engine in the cache; raises as `local_key`."""
        key = self.local_key
        return next((one for one in key.portables if one.portable == self.portable), key)

    @cached_property
    def local_key(self) -> EngineKey:
        """Return the key of an engine for this GPU alone; the graph and its weights are hashed.

        TensorRT times kernels on one GPU under one driver. Portable engines are compiled for all
        GPUs of a compute capability and finished where they are loaded, so that neither the name
        of the GPU nor the driver belongs to their key.

        Raises:
            UnavailableError: the library cannot be used here.
            BackendError: the graph's weights cannot be read.
        """
        device = None if self.spec.portable_engines else self.device
        return EngineKey(
            library=self.spec.module,
            version=load_library(self.spec).__version__,
            platform=f"{sys.platform}-{platform.machine()}",
            sm=self.sm,
            gpu=device.name if device else "",
            driver=device.driver if device else "",
            onnx=hashlib.sha256(self.graph.onnx).hexdigest(),
            weights=_hash_weights(self.graph),
            precision=self.graph.precision,
            batches=self.batches,
        )

    def find_portable(self, cache: EngineCache, load: Callable[..., T | None]) -> T | None:
        """Load a portable engine that somebody has put in the cache, if none is made for this GPU.

        Args:
            cache: the cache.
            load: takes the engine, and whether it brings the runtime of its version.
        """
        if self.spec.portable_engines or cache.path_of(self.local_key).exists():
            return None
        for key in self.local_key.portables:
            if key.portable == "hardware" and jetson_linux() is not None:
                continue
            engine = cache.load(key, partial(load, with_code=key.portable == "version"))
            if engine is not None:
                path = cache.path_of(key)
                say(f"{self.spec.name}: {path} is portable; one for this GPU is faster")
                return engine
        return None

    def obtain(self, cache: EngineCache, load: Callable[[bytes], T | None]) -> T:
        """Load the engine; build it where it is missing or `load` returns None for it.

        Raises:
            BackendError: the library cannot build the graph for that GPU.
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; nothing is kept.
        """
        return cache.obtain(self.key, lambda: self._build(cache), load)

    def _build(self, cache: EngineCache) -> bytes:
        graph, spec, key = self.graph, self.spec, self.key
        gpus = f"SM {key.sm}{' and later' * (self.portable == 'hardware')}"
        say(f"{spec.name} {key.version}: building an engine for {gpus}, once; {cache.folder}")
        # Measurements for one graph serve other graphs on the same GPU.
        shared = replace(
            self.local_key, kind="timing", onnx="", weights="", precision="", batches=()
        )
        timings = None if spec.portable_engines else bytearray(cache.read(shared) or b"")

        def build(cancelled: Event) -> bytes:
            with self.device.active() if self.device else nullcontext():
                return build_engine(
                    graph.onnx,
                    spec,
                    sm=key.sm if spec.portable_engines else None,
                    batches=self.batches,
                    weights_folder=graph.weights_folder,
                    portable=self.portable,
                    timings=timings,
                    cancelled=cancelled,
                )

        engine = run_cancellable(build)
        if timings:
            cache.write(shared, bytes(timings))
        return engine


def run_cancellable(build: Callable[[Event], T]) -> T:
    """Run a build in a thread, and let Ctrl-C stop it.

    While a library builds, its thread runs no Python code but callbacks, where an exception would
    end the process.

    Args:
        build: ends soon after the event that it gets is set.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the build has ended.
        Exception: as `build`.
    """
    cancelled = Event()
    with ThreadPoolExecutor(1, "capt-build") as thread:  # leaving it waits for the build's end
        try:
            future = thread.submit(build, cancelled)
            while not wait([future], _SECONDS_BETWEEN_LOOKS).done:
                pass  # Windows ignores Ctrl-C during a longer wait
        except BaseException:
            cancelled.set()
            raise
        return future.result()


def _hash_weights(graph: StoredGraph) -> str:
    """Return the SHA-256 of the weights that are not in the graph's own file; "" if none are."""
    if graph.weights_folder is None:
        return ""
    manifest = Manifest.from_json(read_metadata(graph.onnx) or "", "the graph")
    path = graph.weights_folder / str(manifest.graphs[graph.precision].weights)
    try:
        return sha256_file(path)
    except OSError as cause:
        raise BackendError(f"expected the graph's weights, came {cause}") from cause
