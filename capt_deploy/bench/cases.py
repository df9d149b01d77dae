"""The cases of `capt-bench`: a bundle on several backends, in several batch sizes and scopes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from capt_deploy.backends.base import DeviceTimed
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import find_backends, library_packages
from capt_deploy.bench.images import Photos
from capt_deploy.bench.measure import SCOPES, BenchOptions, Case, Memory, Threads, Turn, measure
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError, ConfigError, UnavailableError
from capt_deploy.core.files import expand_home, sha256_file
from capt_deploy.core.machine import usable_cores, versions
from capt_deploy.serving.classifier import Classifier

EVERY, ON_GPU = "all", "gpu"  # names for those backends that work here


@dataclass(frozen=True)
class BenchRequest:
    """The rows to measure."""

    backends: tuple[str, ...] = ("auto",)  # or ("all",), ("gpu",): all that work, on a GPU
    precisions: tuple[str, ...] = ()  # (): the best one for each backend; ("all",): all that run
    batches: tuple[int, ...] = (1, 8, 32)
    scopes: tuple[str, ...] = SCOPES
    concurrency: int = 1  # threads that call at once; device times are always of one
    threads: int | None = None  # of a backend on the CPU; None: the classifier's choice

    @property
    def names_several(self) -> bool:
        """Return whether the request leaves open which backends are measured."""
        return bool({EVERY, ON_GPU} & {*self.backends})


def bench(
    bundle: Path, request: BenchRequest, photos: Photos, options: BenchOptions
) -> list[dict[str, Any]]:
    """Measure a bundle, backends side by side, and return a row for each case.

    Args:
        bundle: anything that `Classifier.load` takes.
        request: the rows to measure.
        photos: images to measure with, repeated where a batch is larger.
        options: how long to measure.

    Raises:
        BackendError: a backend named by the request cannot run here, or none can.
        BundleError: the bundle is damaged or lacks a precision.
        ConfigError: no row is left.
    """
    with ExitStack() as stack, Threads(request.concurrency) as threads:
        rows = measure(open_cases(bundle, request, photos, threads, stack), options)
    if not rows:
        raise ConfigError("no row is left to measure; ask for other scopes, or backends on a GPU")
    return rows


def open_cases(
    bundle: Path, request: BenchRequest, photos: Photos, threads: Threads, stack: ExitStack
) -> Iterator[Case]:
    """Yield the cases of a bundle, loading each classifier when its first case is drawn.

    `threads` call the classifiers, and `stack` keeps them open; see `bench` for the rest.
    """
    measured: dict[tuple[str, str, str], str] = {}  # names by backend, device and precision
    runtime = RuntimeOptions(threads=request.threads)
    for name, precision in _classifiers(bundle, request):
        before = Memory.now()
        try:
            classifier = Classifier.load(bundle, name, precision, runtime)
        except BackendError as cause:
            if not request.names_several and EVERY not in request.precisions:
                raise
            label = f"{name} {precision}" if precision else name
            say(f"left out {label}: {str(cause).removeprefix(f'backend {name}: ')}")
            continue
        backend = classifier.backend
        key = backend.name, backend.device, classifier.precision
        if key in measured:
            classifier.close()
            say(f"left out {name}: it is {measured[key]} here, on {backend.device}")
            continue
        stack.enter_context(classifier)
        measured[key] = name
        for skipped, reason in classifier.skipped.items():
            say(f"{name} does without {skipped}: {reason}")
        yield from _cases_of(classifier, before, bundle, request, photos, threads)
    if not measured:
        raise BackendError("no backend can run this bundle here; capt-doctor says why")


def _classifiers(bundle: Path, request: BenchRequest) -> Iterator[tuple[str, str | None]]:
    names = request.backends
    if request.names_several:
        names = tuple(s.name for s in find_backends() if EVERY in names or s.needs_gpu)
    precisions: Iterable[str | None] = request.precisions or (None,)
    if EVERY in request.precisions:
        precisions = open_bundle(bundle).precisions
    return ((name, precision) for name in names for precision in precisions)


def _cases_of(
    classifier: Classifier,
    before: Memory,
    bundle: Path,
    request: BenchRequest,
    photos: Photos,
    threads: Threads,
) -> Iterator[Case]:
    backend, max_batch = classifier.backend, RuntimeOptions().batches[-1]
    graph = _graph_hash(classifier, bundle)
    cpu_threads = (request.threads or usable_cores()) if backend.device == "cpu" else None
    queued = backend.queued if isinstance(backend, DeviceTimed) else None
    for scope in request.scopes:
        on_device = scope == "device"
        if on_device and (reason := _why_untimed(classifier)) is not None:
            say(f"left out device times of {backend.name} on {backend.device}: {reason}")
            continue
        for batch in request.batches:
            if on_device and batch > max_batch:
                say(f"left out device times of batch {batch}: at most {max_batch} run at once")
                continue
            yield Case(
                backend=backend.name,
                device=backend.device,
                precision=classifier.precision,
                batch=batch,
                scope=scope,
                run=_runner(classifier, scope, batch, photos.encoded, threads),
                memory_before=before,
                concurrency=1 if on_device else threads.count,
                details={
                    "graph": graph,
                    "images": photos.source,
                    "threads": cpu_threads,
                    "queued": queued if on_device else None,
                    "versions": versions(library_packages()),
                },
            )


def _why_untimed(classifier: Classifier) -> str | None:
    """Return why the backend cannot measure time on the device; None if it can."""
    if not isinstance(classifier.backend, DeviceTimed):
        return "it has none"
    black = np.zeros((1, *classifier.manifest.preprocess.size, 3), np.uint8)
    try:
        classifier.backend.time_on_device(black, 1)
    except UnavailableError as cause:
        return str(cause)
    return None


def _runner(
    classifier: Classifier, scope: str, batch: int, encoded: Sequence[bytes], threads: Threads
) -> Callable[[int], Turn]:
    """Return the function that runs a case a number of times."""
    batches, backend = full_batches(encoded, batch), classifier.backend
    if scope == "image_to_label":
        number = count()

        def label() -> object:
            images = batches[next(number) % len(batches)]
            return classifier(images[0]) if batch == 1 else classifier.predict(images, batch)

        return lambda times: threads.run(label, times)
    pixels = np.stack([classifier.preprocess(photo) for photo in batches[0]])
    if scope == "host":
        return lambda times: threads.run(lambda: backend.run(pixels), times)
    if not isinstance(backend, DeviceTimed):
        raise BackendError(f"backend {backend.name}: has no device times; ask for scope host")

    def on_device(times: int) -> Turn:
        latencies = backend.time_on_device(pixels, times)
        return Turn(latencies, sum(latencies) / 1000)

    return on_device


def full_batches(encoded: Sequence[bytes], batch: int) -> list[list[bytes]]:
    """Return full batches that hold every image at least once; the last one may repeat some."""
    starts = range(0, len(encoded), batch)
    return [[encoded[(start + i) % len(encoded)] for i in range(batch)] for start in starts]


def _graph_hash(classifier: Classifier, bundle: Path) -> str:
    manifest = classifier.manifest
    record = manifest.files.get(manifest.graphs[classifier.precision].file)
    return record.sha256 if record else sha256_file(expand_home(bundle))
