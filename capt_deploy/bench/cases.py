"""The cases of `capt-bench`: a bundle on several backends, in several batch sizes and scopes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from capt_deploy.backends import AUTO, DeviceTimed, RuntimeOptions
from capt_deploy.backends.choice import why_not
from capt_deploy.bench.measure import SCOPES, BenchOptions, Case, Memory, Threads, Turn, measure
from capt_deploy.bundle.graphs import open_graphs
from capt_deploy.core.cores import usable_cores
from capt_deploy.core.errors import BackendError, ConfigError, UnavailableError
from capt_deploy.core.files import expand_home, sha256_file
from capt_deploy.core.machine import versions
from capt_deploy.serving.classifier import Classifier

EVERY, ON_GPU = "all", "gpu"  # names for several backends: those of them that work here
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """Which rows."""

    backends: tuple[str, ...] = ("auto",)  # or ("all",), ("gpu",): all that work here, on a GPU
    precisions: tuple[str, ...] = ()  # none: what suits each backend; ("all",): all that it can run
    batches: tuple[int, ...] = (1, 8, 32)
    scopes: tuple[str, ...] = SCOPES
    concurrency: int = 1  # threads that call at once; times on the device are always of one
    threads: int | None = None  # of a backend on the CPU; None: as the classifier would choose


@dataclass(frozen=True)
class Photos:
    """Encoded images, and what they are."""

    encoded: Sequence[bytes]
    source: str


def bench(
    bundle: Path, wanted: Wanted, photos: Photos, options: BenchOptions, tell: Tell
) -> list[dict[str, Any]]:
    """Measure a bundle side by side.

    Args:
        bundle: anything that `Classifier.load` takes.
        wanted: which rows.
        photos: to measure with; a batch repeats them where it is larger.
        options: how long.
        tell: is told which of the wanted rows there cannot be, and why.

    Returns:
        A row for each case, as DESIGN describes them.

    Raises:
        BackendError: a backend named by `wanted` cannot run here, or none can.
        BundleError: the bundle is damaged, or lacks a precision.
        ConfigError: no row is left.
    """
    with ExitStack() as stack, Threads(wanted.concurrency) as threads:
        cases = open_cases(bundle, wanted, photos, threads, stack, tell)
        rows = measure(cases, options)
    if not rows:
        raise ConfigError("no row is left to measure; ask for other scopes, or backends on a GPU")
    return rows


def open_cases(
    bundle: Path, wanted: Wanted, photos: Photos, threads: Threads, stack: ExitStack, tell: Tell
) -> Iterator[Case]:
    """Yield the cases of a bundle, each loaded when it is asked for; see `bench`.

    Args:
        bundle: anything that `Classifier.load` takes.
        wanted: which rows.
        photos: to measure with.
        threads: that call.
        stack: on which what is loaded stays open.
        tell: is told what is left out.
    """
    seen: dict[tuple[str, str, str], str] = {}  # what a name stands for here
    runtime = RuntimeOptions(threads=wanted.threads)
    several = bool({EVERY, ON_GPU} & {*wanted.backends})
    for name, precision in _requests(bundle, wanted):
        if several and (reason := why_not(name)) is not None:
            tell(f"left out {name}: {reason}")
            continue
        before = Memory.now()
        try:
            classifier = Classifier.load(bundle, name, precision, runtime)
        except BackendError as cause:
            if not several and EVERY not in wanted.precisions:
                raise
            tell(f"left out {name}{f' {precision}' if precision else ''}: {cause}")
            continue
        backend = classifier.backend
        key = (backend.name, backend.device, classifier.precision)
        if key in seen:
            classifier.close()
            tell(f"left out {name}: it is {seen[key]} here, on {backend.device}")
            continue
        stack.enter_context(classifier)
        seen[key] = name
        for other, reason in classifier.skipped.items():
            tell(f"{name} does without {other}: {reason}")
        yield from _cases_of(classifier, before, bundle, wanted, photos, threads, tell)
    if not seen:
        raise BackendError("no backend can run this bundle here; capt-doctor says why")


def _requests(bundle: Path, wanted: Wanted) -> Iterator[tuple[str, str | None]]:
    names = wanted.backends
    if EVERY in names or ON_GPU in names:
        names = AUTO if EVERY in names else AUTO[:-1]  # the last one is the CPU's
    precisions: Iterable[str | None] = wanted.precisions or (None,)
    if EVERY in wanted.precisions:
        precisions = tuple(open_graphs(bundle).precisions)
    return ((name, precision) for name in names for precision in precisions)


def _cases_of(
    classifier: Classifier,
    before: Memory,
    bundle: Path,
    wanted: Wanted,
    photos: Photos,
    threads: Threads,
    tell: Tell,
) -> Iterator[Case]:
    backend, largest = classifier.backend, RuntimeOptions().batches[-1]
    details = {
        "graph": _graph_hash(classifier, bundle),
        "images": photos.source,
        "threads": (wanted.threads or usable_cores()) if backend.device == "cpu" else None,
    }
    for scope in wanted.scopes:
        if scope == "device" and (reason := _untimed(classifier)) is not None:
            tell(f"left out device times of {backend.name} on {backend.device}: {reason}")
            continue
        for batch in wanted.batches:
            if scope == "device" and batch > largest:
                tell(f"left out device times of batch {batch}: at most {largest} run at once")
                continue
            yield Case(
                backend=backend.name,
                device=backend.device,
                precision=classifier.precision,
                batch=batch,
                scope=scope,
                run=_runs(classifier, scope, batch, photos.encoded, threads),
                versions=versions(),
                memory_before=before,
                concurrency=1 if scope == "device" else threads.count,
                # ONNX Runtime waits for every run; TensorRT's stand in a queue.
                details={
                    **details,
                    "queued": backend.name != "onnxruntime" if scope == "device" else None,
                },
            )


def _untimed(classifier: Classifier) -> str | None:
    """Return why the device's own time cannot be had; None if it can."""
    if not isinstance(classifier.backend, DeviceTimed):
        return "it has none"
    one = np.zeros((1, *classifier.manifest.preprocess.size, 3), np.uint8)
    try:
        classifier.backend.time_on_device(one, 1)
    except UnavailableError as cause:
        return str(cause)
    return None


def _runs(
    classifier: Classifier, scope: str, batch: int, encoded: Sequence[bytes], threads: Threads
) -> Callable[[int], Turn]:
    """Return what runs one case so many times."""
    batches = full_batches(encoded, batch)
    backend = classifier.backend
    if scope == "image_to_label":
        number = count()

        def label() -> object:
            own = batches[next(number) % len(batches)]
            return classifier(own[0]) if batch == 1 else classifier.predict(own, batch)

        return lambda times: threads.run(label, times)
    pixels = np.stack([classifier.preprocess(photo) for photo in batches[0]])
    if scope == "host":
        return lambda times: threads.run(lambda: backend.run(pixels), times)
    if not isinstance(backend, DeviceTimed):  # left out before this; see `_untimed`
        raise BackendError(f"backend {backend.name}: has no device times; ask for scope host")

    def on_device(times: int) -> Turn:
        latencies = backend.time_on_device(pixels, times)
        return Turn(latencies, sum(latencies) / 1000)

    return on_device


def full_batches(encoded: Sequence[bytes], batch: int) -> list[list[bytes]]:
    """Return batches that hold every image at least once; the last begins anew where it must."""
    starts = range(0, len(encoded), batch)
    return [[encoded[(start + i) % len(encoded)] for i in range(batch)] for start in starts]


def _graph_hash(classifier: Classifier, bundle: Path) -> str:
    """Return what tells the measured graph from others."""
    manifest = classifier.manifest
    record = manifest.files.get(manifest.graphs[classifier.precision].file)
    return record.sha256 if record else sha256_file(expand_home(bundle))
