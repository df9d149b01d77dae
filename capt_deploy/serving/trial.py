"""Measure which backend and precision run a bundle fastest on this CPU, and remember it.

No fixed order is right for all: it depends on the processor's instructions, on the model, and on
the number of threads.
"""

import hashlib
import json
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capt_deploy.backends.base import Backend, Outputs, Pixels, concatenate
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import BackendSpec, library_packages
from capt_deploy.bundle.read import REFERENCE, Bundle
from capt_deploy.core.console import say
from capt_deploy.core.errors import BackendError, BundleError, CaptError
from capt_deploy.core.files import cache_folder, read_json, write_json
from capt_deploy.core.machine import describe_host, versions
from capt_deploy.verify.gate import compare_outputs
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns

_PATTERNS = 3  # images that are run
_SECONDS = 0.3  # of measuring, at least
_HOPELESS = 2.0  # times the time of the fastest so far, after which a way is given up
_TIE = 0.95  # a less exact way has to be faster than this share of the time


class Way(NamedTuple):
    """A backend and a precision."""

    spec: BackendSpec
    precision: str

    def __str__(self) -> str:
        return f"{self.spec.name} {self.precision}"


def fastest(
    bundle: Bundle,
    ways: Sequence[Way],
    options: RuntimeOptions,
    open_way: Callable[[Way], Backend],
    problems: MutableMapping[str, str],
) -> tuple[Backend, str]:
    """Open the fastest of several ways to run a bundle on this CPU.

    Each runs drawn images in the smallest batch of the options. A way whose answers are not within
    the gate's limits of the trained model's is none: int8 kernels of processors without VNNI
    saturate. The result is kept in the user's cache folder for this processor, bundle, options and
    versions of the libraries.

    Args:
        bundle: the bundle.
        ways: the most exact first.
        options: how to use the machine.
        open_way: opens one of them.
        problems: receives the reason of each way that fails, by its backend's name.

    Returns:
        The backend and its precision.

    Raises:
        BackendError: all ways fail.
        BundleError: the bundle is damaged.
    """
    if len(ways) == 1:
        return open_way(ways[0]), ways[0].precision
    key = _key(bundle, ways, options)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "trials" / f"{name}.json"
    if (known := _remembered(path, ways)) is not None:
        with suppress(BackendError):  # it may work no more; then all are measured again
            return open_way(known), known.precision
    say(f"measuring what runs this bundle fastest here, once: {', '.join(map(str, ways))}")
    best: tuple[Way, Backend] | None = None
    times: dict[str, float] = {}
    least = inf
    for way in ways:
        try:
            backend = open_way(way)
            taken = times[str(way)] = _measure(backend, way, bundle, options, least)
        except BackendError as error:
            problems[way.spec.name] = f"{way.precision}: {error}"
            continue
        if best is None or taken < _TIE * least:
            if best is not None:
                best[1].close()
            best, least = (way, backend), taken
        else:
            backend.close()
    if best is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in problems.items())
        raise BackendError(f"no backend runs this bundle on the CPU: {reasons}")
    listed = ", ".join(f"{way} {1000 * seconds:.1f} ms" for way, seconds in times.items())
    say(f"fastest for one image: {best[0]} ({listed})")
    with suppress(OSError, CaptError):  # without it the next start measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "chosen": str(best[0]), "seconds": times})
    return best[1], best[0].precision


def _measure(
    backend: Backend, way: Way, bundle: Bundle, options: RuntimeOptions, least: float
) -> float:
    """Return the seconds that an image takes; at once where they are far above `least`.

    Raises:
        BackendError: a run fails, or its outputs are beyond the gate's limits.
    """
    patterns = draw_patterns(bundle.manifest.preprocess.size)[:_PATTERNS]
    outputs = concatenate(backend.run(pattern[np.newaxis]) for pattern in patterns)
    _check(outputs, way.precision, bundle)
    smallest = options.batches[0]
    images: Pixels = np.ascontiguousarray(np.resize(patterns, (smallest, *patterns.shape[1:])))
    taken, start = inf, time.perf_counter()
    while time.perf_counter() - start < _SECONDS or taken == inf:
        before = time.perf_counter()
        backend.run(images)
        taken = min(taken, (time.perf_counter() - before) / smallest)
        if taken > _HOPELESS * least:
            break
    return taken


def _check(outputs: Outputs, precision: str, bundle: Bundle) -> None:
    """Compare outputs for the first patterns with the trained model's, if the bundle has them."""
    if bundle.lone_graph is not None or REFERENCE not in bundle.manifest.files:
        return
    expected = Outputs(
        *(part[:_PATTERNS] for part in ReferenceOutputs.from_bundle(bundle).patterns)
    )
    unknown = np.full(_PATTERNS, -1)
    calibration = bundle.calibration_of(precision)
    # Processors round float32 differently as well, by more than the export's own gate allows.
    limits = "fp16" if precision == "fp32" else precision
    result = compare_outputs(limits, expected, outputs, unknown, calibration)
    if result.failures:
        raise BackendError(f"differs from the trained model: {', '.join(result.failures)}")


def _remembered(path: Path, ways: Sequence[Way]) -> Way | None:
    """Return the way that an earlier trial chose; None where there was none."""
    try:
        chosen = read_json(path, BundleError)["chosen"]
    except (OSError, CaptError, KeyError, TypeError):  # none, or damaged
        return None
    return next((way for way in ways if str(way) == chosen), None)


def _key(bundle: Bundle, ways: Sequence[Way], options: RuntimeOptions) -> dict[str, Any]:
    """Return all that the result depends on, as JSON."""
    files = bundle.manifest.files
    if bundle.lone_graph is not None:
        graphs = [hashlib.sha256(bundle.lone_graph.onnx).hexdigest()]
    else:
        used = dict.fromkeys(bundle.manifest.graphs[way.precision].file for way in ways)
        graphs = [files[file].sha256 for file in used]
    host = describe_host()
    return {
        "graphs": graphs,
        "ways": [str(way) for way in ways],
        "cpu": host["cpu"],
        "threads": options.threads or host["cores"],
        "batch": options.batches[0],
        "versions": versions(library_packages()),
    }
