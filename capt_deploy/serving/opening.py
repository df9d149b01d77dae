"""Open the backend that runs a bundle: the one that is asked for, or the fastest that works."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from capt_deploy.backends.base import Backend
from capt_deploy.backends.choice import first_that_works
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import AUTO, BackendSpec, find_backends
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.bundle.read import REPORT, Bundle
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import parse_json
from capt_deploy.serving.trial import Way, fastest
from capt_deploy.verify.gate import LIMITS


class Opened(NamedTuple):
    """A backend that runs one graph of a bundle."""

    backend: Backend
    precision: str
    skipped: Mapping[str, str]  # by name of another backend, why it is not used


def open_backend(
    bundle: Bundle, name: str, precision: str | None, options: RuntimeOptions
) -> Opened:
    """Open a backend on a graph of a bundle.

    `auto` takes the first backend for GPUs that works, and else what is fastest on this CPU, which
    a trial measures.

    Args:
        bundle: the bundle.
        name: one of `capt_deploy.backends.spec.backend_names()`.
        precision: of the graph; None for the one that suits the backend, or is fastest.
        options: how to use the machine.

    Raises:
        BundleError: the bundle is damaged, or does not hold that precision.
        BackendError: the requested backend cannot run here.
    """
    loaded: list[StoredGraph] = []  # the last graph, in case the next backend takes it too
    specs = find_backends(name)
    ways = cpu_ways(bundle, specs, precision) if name == AUTO else []
    problems: dict[str, str] = {}

    def open_way(way: Way) -> Backend:
        if not loaded or loaded[0].precision != way.precision:
            loaded.clear()  # so that two graphs are never in memory
            loaded.append(bundle.graph(way.precision))
        graph = loaded[0]
        return way.spec.open(graph.onnx, graph.precision, graph.weights_folder, options)

    def start(spec: BackendSpec) -> tuple[Backend, str]:
        if ways and not spec.needs_gpu:
            return fastest(bundle, ways, options, open_way, problems)
        way = Way(spec, precision or spec.preferred(bundle.precisions))
        return open_way(way), way.precision

    if ways:
        specs = (*(spec for spec in specs if spec.needs_gpu), ways[0].spec)
    (backend, chosen), skipped = first_that_works(specs, start)
    return Opened(backend, chosen, {**skipped, **problems})


def cpu_ways(bundle: Bundle, specs: Sequence[BackendSpec], precision: str | None) -> list[Way]:
    """Return the ways to run a bundle on this CPU that may be the fastest, the most exact first.

    Graphs that failed the export's gate, and were written all the same, are none.
    """
    if precision is not None and precision not in bundle.precisions:
        return []
    usable = [spec for spec in specs if not spec.needs_gpu and spec.problem() is None]
    failed = set() if precision else _failed(bundle)
    ways = [
        Way(spec, name)
        for spec in usable
        for name in ((precision,) if precision else spec.worth_trying(bundle.precisions))
        if name not in failed
    ]
    # In groups of one precision, so that each graph is read once.
    return sorted(ways, key=lambda way: 0 if precision else [*LIMITS].index(way.precision))


def _failed(bundle: Bundle) -> set[str]:
    """Return the precisions whose graphs failed the gate and were written with --force."""
    if bundle.manifest.verified or REPORT not in bundle.manifest.files:
        return set()
    report = parse_json(bundle.read(REPORT), f"{bundle.path}, {REPORT}", BundleError)
    return {precision for precision, result in report["gate"].items() if not result["passed"]}
