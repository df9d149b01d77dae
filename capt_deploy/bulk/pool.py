"""Run parts on Ray, which only this file imports: one actor for each engine."""

import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from capt_deploy.backends.spec import BackendSpec
from capt_deploy.bulk.labeller import Labeller
from capt_deploy.bulk.parts import Part
from capt_deploy.core.errors import BackendError, CaptError
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.version import __version__

LOCAL, AUTO = "local", "auto"  # addresses: a Ray of this machine; the cluster around it
_SECONDS_TO_CONNECT = 10
_LOCAL_STORE = 2**28  # bytes; only names of photos pass through it
_ATTEMPTS = 3  # at a part whose worker dies, as for want of memory or of a broken decoder


class Engines(NamedTuple):
    """The actors of a pool."""

    number: int
    cores: int  # of each
    gpus: int  # of each


class Outcome(NamedTuple):
    """What became of a part."""

    part: int
    running_on: str = ""  # backend, device and precision
    error: str = ""  # that other parts would meet, too
    lost: bool = False  # whether its worker died again and again


def _import_ray() -> Any:
    """Import Ray with its telemetry switched off, unless the environment asks for it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    return ray


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Start Ray on this machine, or connect to a cluster, until the block ends.

    Raises:
        BackendError: there is no cluster at the address, or no capt of this version in it.
    """
    ray = _import_ray()
    if ray.is_initialized():  # by a program that calls this
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        quiet |= {"num_cpus": usable_cores(), "object_store_memory": _LOCAL_STORE}
        quiet |= {"include_dashboard": False}
    elif address != AUTO:
        _check_address(address)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as cause:
        raise BackendError(
            f"Ray at {address!r}: cannot be reached ({cause}); a cluster may ask for a token: "
            f"set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from cause
    try:
        if main:  # Ray's own would end the command without a word
            signal.signal(signal.SIGTERM, handler)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if address != LOCAL:
            _check_workers()
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise an error where nothing listens, because Ray would wait for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()
    except (OSError, ValueError, OverflowError) as cause:
        raise BackendError(
            f"Ray at {address!r}: expected HOST:PORT of a cluster that can be reached ({cause})"
        ) from cause


def _check_workers() -> None:
    ray = _import_ray()
    try:
        found = ray.get(ray.remote(num_cpus=0)(_version).remote())
    except (ray.exceptions.RayError, ImportError) as cause:
        raise BackendError(
            f"expected capt {__version__} on the machines of the cluster, came an error "
            f"({str(cause).splitlines()[-1]}); install capt there with the extra ray"
        ) from cause
    if found != __version__:
        raise BackendError(
            f"expected capt {__version__} on the machines of the cluster, came {found}"
        )


def _version() -> str:
    return __version__


def choose_engines(specs: Sequence[BackendSpec], nodes: Sequence[dict[str, float]]) -> Engines:
    """Return one actor for each GPU that a backend can use; without one, one for each core.

    Args:
        specs: backends that may be used.
        nodes: resources of each machine, as Ray counts them.

    Raises:
        BackendError: the backends need a GPU, and there is none.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus and any(spec.needs_gpu for spec in specs):
        cores = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)
        return Engines(sum(int(node["GPU"]) for node in with_gpus), max(1, cores), 1)
    if all(spec.needs_gpu for spec in specs):
        names = ", ".join(spec.name for spec in specs)
        raise BackendError(f"backend {names}: expected a GPU among Ray's resources, found none")
    return Engines(max(1, sum(int(node.get("CPU", 0)) for node in nodes)), 1, 0)


def machines() -> list[dict[str, float]]:
    """Return the resources of each machine that Ray has now."""
    return [node["Resources"] for node in _import_ray().nodes() if node["Alive"]]


def label_parts(parts: Sequence[Part], labeller: Labeller, engines: Engines) -> Iterator[Outcome]:
    """Label parts and yield what became of each, in any order.

    Raises:
        BackendError: Ray itself failed.
    """
    ray = _import_ray()
    # Ray tries a part whose worker died again without end.
    attempts = ray.remote(num_cpus=0)(_Attempts).remote()
    # The bundle goes into Ray's store once, whatever the number of actors.
    content = ray.put(labeller.content)
    shared = (replace(labeller, content=None), content, attempts, Path.cwd())
    items = ray.data.from_items([part.to_item() for part in parts], override_num_blocks=len(parts))
    rows = items.map(
        _Actor,
        fn_constructor_args=shared,
        compute=ray.data.ActorPoolStrategy(size=min(engines.number, len(parts))),
        num_cpus=engines.cores,
        num_gpus=engines.gpus,
    )
    try:
        for row in rows.iter_rows():
            yield Outcome(**row)
    except ray.exceptions.RayError as cause:
        raise BackendError(f"Ray failed ({cause}); the same command continues") from cause


class _Attempts:
    """Counts how often each part was begun."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, part: int) -> int:
        self._counts[part] += 1
        return self._counts[part]


class _Actor:
    """An engine in a process of its own."""

    def __init__(self, labeller: Labeller, content: Any, attempts: Any, folder: Path) -> None:
        if folder.is_dir():  # relative names mean the same as in the command
            os.chdir(folder)
        self._get = _import_ray().get
        self._labeller = replace(labeller, content=self._get(content))
        self._attempts = attempts

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        part = Part.from_item(item)
        if self._get(self._attempts.begin.remote(part.number)) > _ATTEMPTS:
            return Outcome(part.number, lost=True)._asdict()
        try:
            self._labeller.label(part)
        except (CaptError, OSError) as cause:
            return Outcome(part.number, error=str(cause))._asdict()
        return Outcome(part.number, self._labeller.classifier.running_on)._asdict()
