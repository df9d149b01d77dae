"""Measure which backend and precision run a bundle fastest on this CPU, and remember it.

No fixed order is right for all: it depends on the processor's instructions, on the model, and on
the number of threads.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capt_deploy.backends.base import Backend, Outputs, concatenate
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import BackendSpec, library_packages
from capt_deploy.bundle.read import REFERENCE, Bundle
from capt_deploy.core.console import say, warn
from capt_deploy.core.errors import BackendError, BundleError, CaptError
from capt_deploy.core.files import cache_folder, read_json, write_json
from capt_deploy.core.machine import cpu_features, describe_host, versions
from capt_deploy.verify.gate import compare_outputs
from capt_deploy.verify.reference import PATTERNS, ReferenceOutputs, draw_patterns

_SECONDS = 0.3  # of measuring, at least
_RUNS = 3  # at least, before a candidate is given up
_HOPELESS = 2.0  # times the time of the fastest so far, above which it is given up
_ALL_DIFFER = "none gives the trained model's answers; the fastest is used all the same"
_TIE = 0.95  # share of the time so far that a less exact candidate has to stay below


class Candidate(NamedTuple):
    """A backend, and the precision of the graph that it would run."""

    spec: BackendSpec
    precision: str

    def __str__(self) -> str:
        return f"{self.spec.name} {self.precision}"


def fastest(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    options: RuntimeOptions,
    open_candidate: Callable[[Candidate], Backend],
    *,
    check: bool = True,
) -> tuple[Backend, Candidate]:
    """Open the fastest of several candidates on this CPU.

    Each runs drawn images in the smallest batch of the options. The choice is kept in the user's
    cache folder for this processor, bundle, options and versions of the libraries; a single
    candidate is opened without a trial.

    Args:
        bundle: the bundle.
        candidates: the most exact first.
        options: how to use the machine.
        open_candidate: opens one of them.
        check: leave out candidates whose answers are not within the gate's limits of the trained
            model's, as int8 kernels of processors without VNNI saturate; unless it is so of all.

    Returns:
        The backend, and the candidate that it is.

    Raises:
        BackendError: all candidates fail.
        BundleError: the bundle is damaged.
    """
    if len(candidates) == 1:
        return open_candidate(candidates[0]), candidates[0]
    key = {**_key(bundle, candidates, options), "check": check}
    path = _path(key)
    remembered, differs = _remembered(path, candidates)
    if remembered is not None:
        with suppress(BackendError):  # it may work no more; then all are measured again
            backend = open_candidate(remembered)
            if differs:
                warn(_ALL_DIFFER)
            return backend, remembered
    say(f"measuring what runs this bundle fastest here, once: {', '.join(map(str, candidates))}")
    expected = _patterns(bundle) if check else None
    best: tuple[Backend, Candidate] | None = None
    times: dict[str, float] = {}
    reasons: dict[str, str] = {}
    least = inf
    for candidate in candidates:
        try:
            backend = open_candidate(candidate)
            with _closed_on_error(backend):
                seconds, outputs = _measure(backend, bundle, options, least)
                if expected is not None and seconds < _TIE * least:
                    _check(outputs, expected, bundle, candidate.precision)
        except Exception as error:
            if isinstance(error, CaptError) and not isinstance(error, BackendError):
                raise  # the bundle's own
            reasons[str(candidate)] = str(error) or type(error).__name__
            warn(f"{candidate} is not used: {reasons[str(candidate)]}")
            continue
        times[str(candidate)] = seconds
        if seconds < _TIE * least:
            if best is not None:
                best[0].close()
            best, least = (backend, candidate), seconds
        else:
            backend.close()
    if best is None and expected is not None:
        warn(_ALL_DIFFER)
        best = fastest(bundle, candidates, options, open_candidate, check=False)
        _remember(path, {"key": key, "chosen": str(best[1]), "differs": True})
        return best
    if best is None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendError(f"no backend runs this bundle on the CPU: {listed}")
    listed = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
    say(f"fastest for one image: {best[1]} ({listed})")
    _remember(path, {"key": key, "chosen": str(best[1]), "seconds": times})
    return best


@contextmanager
def _closed_on_error(backend: Backend) -> Iterator[None]:
    try:
        yield
    except BaseException:
        backend.close()
        raise


def _measure(
    backend: Backend, bundle: Bundle, options: RuntimeOptions, least: float
) -> tuple[float, Outputs]:
    """Return the least seconds that an image takes, and the outputs for the patterns that ran.

    Ends early where the candidate is far slower than `least`.

    Raises:
        BackendError: a run fails.
    """
    size, patterns = options.batches[0], draw_patterns(bundle.manifest.preprocess.size)
    count = -(-PATTERNS // size) * size  # a whole number of batches
    batches = np.split(np.resize(patterns, (count, *patterns.shape[1:])), count // size)
    backend.run(batches[0])  # the first run allocates
    outputs: list[Outputs] = []
    seconds, start = inf, time.perf_counter()
    runs = 0
    while runs < len(batches) or time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        found = backend.run(batches[runs % len(batches)])
        seconds = min(seconds, (time.perf_counter() - before) / size)
        if runs < len(batches):
            outputs.append(found)
        runs += 1
        if runs >= _RUNS and seconds > _HOPELESS * least:
            break
    return seconds, concatenate(outputs)


def _patterns(bundle: Bundle) -> Outputs | None:
    """Return the trained model's answers for the drawn patterns; None if the bundle has none."""
    if bundle.lone_graph is not None or REFERENCE not in bundle.manifest.files:
        return None
    return ReferenceOutputs.from_bundle(bundle).patterns


def _check(outputs: Outputs, expected: Outputs, bundle: Bundle, precision: str) -> None:
    """Raise a `BackendError` where outputs are beyond the gate's limits."""
    shown = Outputs(*(part[:PATTERNS] for part in outputs))
    # Processors round float32 differently as well, by more than the export's own gate allows.
    limits, unknown = "fp16" if precision == "fp32" else precision, np.full(PATTERNS, -1)
    calibration = bundle.calibration_of(precision)
    result = compare_outputs(limits, expected, shown, unknown, calibration)
    if result.failures:
        raise BackendError(f"differs from the trained model: {', '.join(result.failures)}")


def _path(key: dict[str, Any]) -> Path | None:
    """Return the file of a trial; None where nothing can be kept."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        return cache_folder() / "trials" / f"{name}.json"
    except CaptError:
        return None


def _remember(path: Path | None, result: dict[str, Any]) -> None:
    """Write a trial; without it the next start measures again."""
    if path is not None:
        with suppress(OSError, CaptError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)


def _remembered(
    path: Path | None, candidates: Sequence[Candidate]
) -> tuple[Candidate | None, bool]:
    """Return what an earlier trial chose, if any did, and whether its answers differed."""
    if path is None:
        return None, False
    try:
        result = read_json(path, BundleError)
        chosen, differs = result["chosen"], bool(result.get("differs"))
    except (OSError, CaptError, KeyError, TypeError, AttributeError):  # none, or damaged
        return None, False
    return next((one for one in candidates if str(one) == chosen), None), differs


def _key(
    bundle: Bundle, candidates: Sequence[Candidate], options: RuntimeOptions
) -> dict[str, Any]:
    """Return all that the result depends on, as JSON."""
    if bundle.lone_graph is not None:
        files = {"": hashlib.sha256(bundle.lone_graph.onnx).hexdigest()}
    else:
        files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    host = describe_host()
    return {
        "files": files,
        "candidates": [str(candidate) for candidate in candidates],
        "cpu": host["cpu"],
        "features": hashlib.sha256(cpu_features().encode()).hexdigest(),
        "threads": options.threads or host["cores"],
        "batch": options.batches[0],
        "versions": versions(library_packages()),
    }
