"""Open the backend that runs a bundle: the one that is asked for, or the fastest that works."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from capt_deploy.backends.base import Backend
from capt_deploy.backends.choice import first_that_works
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import AUTO, BackendSpec, find_backends
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.bundle.read import Bundle
from capt_deploy.serving.trial import Candidate, fastest
from capt_deploy.verify.gate import LIMITS


class Opened(NamedTuple):
    """A backend that runs one graph of a bundle."""

    backend: Backend
    candidate: Candidate  # its spec, and the graph's precision
    skipped: Mapping[str, str]  # by name of a backend for GPUs, why it is not used


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
    on_cpu = cpu_candidates(bundle, specs, precision) if name == AUTO else []

    def open_candidate(candidate: Candidate) -> Backend:
        if not loaded or loaded[0].precision != candidate.precision:
            loaded.clear()  # so that two graphs are never in memory
            loaded.append(bundle.graph(candidate.precision))
        graph = loaded[0]
        return candidate.spec.open(graph.onnx, graph.precision, graph.weights_folder, options)

    def start(spec: BackendSpec) -> tuple[Backend, Candidate]:
        if on_cpu and not spec.needs_gpu:
            # A precision that the caller has named is run as it is.
            return fastest(bundle, on_cpu, options, open_candidate, check=precision is None)
        candidate = Candidate(spec, precision or spec.preferred(bundle.precisions))
        return open_candidate(candidate), candidate

    if on_cpu:
        specs = (*(spec for spec in specs if spec.needs_gpu), on_cpu[0].spec)
    (backend, candidate), skipped = first_that_works(specs, start)
    return Opened(backend, candidate, skipped)


def cpu_candidates(
    bundle: Bundle, specs: Sequence[BackendSpec], precision: str | None
) -> list[Candidate]:
    """Return the backends and precisions to run a bundle with on this CPU, the most exact first."""
    if precision is not None and precision not in bundle.precisions:
        return []
    candidates = [
        Candidate(spec, name)
        for spec in specs
        if not spec.needs_gpu and spec.problem() is None
        for name in ((precision,) if precision else spec.worth_trying(bundle.precisions))
    ]
    # In groups of one precision, so that each graph is read once.
    order = {name: place for place, name in enumerate(LIMITS)}
    return sorted(candidates, key=lambda candidate: order.get(candidate.precision, len(order)))
