"""Build TensorRT engines from ONNX. The only file that imports `tensorrt` or `tensorrt_rtx`.

Both have the same Python API. There is no precision to choose here: networks are strongly typed,
so every tensor has the type that the ONNX file gives it. TensorRT-RTX builds for a named generation
of GPUs and needs none itself; TensorRT builds for the GPU it runs on.
"""

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from capt_deploy.backends.options import BATCHES
from capt_deploy.backends.spec import TENSORRT_RTX, BackendSpec
from capt_deploy.core.console import Progress
from capt_deploy.core.errors import BackendError, UnavailableError

_MOST_ERRORS = 8  # shown of a graph with many unsupported nodes
_MOST_KEPT = 64  # errors that a logger remembers
_one_build = threading.Lock()  # all builds share one logger; this tells whose error it is


def build_engine(
    onnx: bytes,
    spec: BackendSpec = TENSORRT_RTX,
    *,
    sm: int | None = None,
    batches: tuple[int, int, int] = BATCHES,
    weights_folder: Path | None = None,
    portable: str = "",
    timings: bytearray | None = None,
    cancelled: threading.Event | None = None,
) -> bytes:
    """Build an engine for this version of the library; slow, and nothing is cached.

    Args:
        onnx: a graph whose inputs have a free first axis, the batch, or no free axis.
        spec: a backend with `builds_engines`.
        sm: compute capability to build for, such as 89 for 8.9; only with `portable_engines`,
            which otherwise builds for all GPUs that the library knows from Ampere (80) on.
        batches: smallest, usual and largest batch; the usual one runs best.
        weights_folder: folder of weights that are not in the graph's own file.
        portable: "hardware" for an engine that runs on every GPU from Ampere on, "version" for one
            that later versions of TensorRT run; TensorRT only. Both may be slower.
        timings: measurements of kernels on this GPU, which the build reads and replaces; TensorRT
            only, because TensorRT-RTX measures nothing.
        cancelled: shows progress, and ends the build with an error soon after it is set.

    Raises:
        UnavailableError: the library is missing, too old, or does not know the GPU.
        BackendError: the library cannot build this graph for that GPU.
    """
    trt = load_library(spec)
    with _one_build:
        errors = make_logger(spec).listen()
        builder = _start("Builder", spec)
        # TensorRT 10 has a flag for strongly typed networks; later versions have no others.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        # The parser owns the weights: it has to live until the engine is built.
        parser = trt.OnnxParser(network, make_logger(spec))
        _parse(parser, onnx, weights_folder, spec.name)
        config = builder.create_builder_config()
        # float32 as the gate has seen it; fp16 is there for speed.
        config.clear_flag(trt.BuilderFlag.TF32)
        _add_profile(builder, config, network, batches)
        if sm is not None:
            _set_target(trt, config, sm, spec.name)
        if portable == "hardware":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif portable == "version":
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Neither the monitor nor the timings belong to the configuration: both have to live here.
        monitor = None if cancelled is None else _make_monitor(trt, cancelled)
        if monitor is not None:
            config.progress_monitor = monitor
        timing_cache = None if timings is None else _use_timings(config, timings)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            gpu = "" if sm is None else f" for SM{sm}"
            raise BackendError(f"{spec.name} cannot build the graph{gpu}: {_join(errors())}")
        if timings is not None and timing_cache is not None:
            timings[:] = timing_cache.serialize()
        return bytes(engine)


def load_library(spec: BackendSpec) -> Any:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        UnavailableError: it is not installed, does not load, or is too old.
    """
    try:
        trt = importlib.import_module(spec.module)
    except ModuleNotFoundError as cause:
        raise UnavailableError(f"{spec.module} is missing; {spec.install}") from cause
    except Exception as cause:  # a library that does not fit this machine fails in many ways
        raise UnavailableError(f"{spec.module} is installed but does not load: {cause}") from cause
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < spec.oldest:
        raise UnavailableError(
            f"{spec.module}: expected {'.'.join(map(str, spec.oldest))} or newer, came "
            f"{trt.__version__}; {spec.install}"
        )
    return trt


@cache
def make_logger(spec: BackendSpec) -> Any:
    """Return the one logger of a library: it prints nothing and keeps errors for `listen`."""
    base: Any = load_library(spec).ILogger
    kept_severities = (base.ERROR, base.INTERNAL_ERROR)

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings do not support super()
            self._numbers = count()
            self._last: deque[tuple[int, str]] = deque(maxlen=_MOST_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in kept_severities:
                self._last.append((next(self._numbers), " ".join(message.split())))

        def listen(self) -> Callable[[], list[str]]:
            """Return a function that returns the errors logged since this call."""
            start = next(self._numbers)
            return lambda: [text for number, text in list(self._last) if number > start]

    return Logger()


def start_runtime(spec: BackendSpec) -> Any:
    """Return an `IRuntime`, which loads engines.

    Raises:
        UnavailableError: the library does not work with this GPU and driver.
    """
    return _start("Runtime", spec)


def _start(kind: str, spec: BackendSpec) -> Any:
    """Make a `Builder` or a `Runtime`."""
    logger = make_logger(spec)
    errors = logger.listen()
    try:
        return getattr(load_library(spec), kind)(logger)
    except Exception as cause:  # TensorRT reports a missing GPU or driver like this
        reasons = _join([*errors(), str(cause)])
        raise UnavailableError(f"{spec.name} cannot start: {reasons}") from cause


def _parse(parser: Any, onnx: bytes, weights_folder: Path | None, name: str) -> None:
    # The parser reads external weights beside the file that it is told. Without a folder it would
    # read them from the current one, where files have nothing to do with the graph.
    folder = Path(os.devnull) / "none" if weights_folder is None else weights_folder
    if parser.parse(onnx, str(folder / "model.onnx")) and not parser.num_errors:
        return
    errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
    more = [f"and {len(errors) - _MOST_ERRORS} more"] if len(errors) > _MOST_ERRORS else []
    raise BackendError(f"{name} cannot read the graph: {'; '.join([_join(errors), *more])}")


def _describe(error: Any) -> str:
    reason = " ".join(error.desc().split())
    if not error.node_operator():
        return reason
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}"


def _add_profile(builder: Any, config: Any, network: Any, batches: tuple[int, int, int]) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        images = network.get_input(index)
        batch, *rest = images.shape
        if -1 in rest:
            raise BackendError(f"input {images.name}: only its batch may be free, came {rest}")
        if batch == -1:
            profile.set_shape(images.name, *((size, *rest) for size in batches))
    config.add_optimization_profile(profile)


def _use_timings(config: Any, timings: bytearray) -> Any:
    """Give the timings to a build; those of another GPU or version are dropped."""
    for data in (bytes(timings), b""):
        timing_cache = config.create_timing_cache(data)
        if timing_cache is not None and config.set_timing_cache(timing_cache, False):
            return timing_cache
    return None


def _set_target(trt: Any, config: Any, sm: int, name: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    members = [] if known is None else list(known.__members__)
    sms = sorted(int(member[2:]) for member in members if member.startswith("SM"))
    if not sms:
        raise BackendError(f"{name} builds only for the GPU it runs on; leave SM {sm} out")
    if sm not in sms:
        raise UnavailableError(f"{name}: SM {sm} is not one of {', '.join(map(str, sms))}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(known, f"SM{sm}"), 0):
        raise BackendError(f"{name}: SM {sm} cannot be built for here")


def _make_monitor(trt: Any, cancelled: threading.Event) -> Any:
    """Return an `IProgressMonitor` that shows the steps of the build and what it is doing.

    The library calls it from several threads, and an exception in it would end the process.
    """
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings do not support super()
            self._lock = threading.Lock()
            self._whole: str | None = None  # the phase that has no parent
            self._progress: Progress | None = None
            self._left = 0  # steps of the whole

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock, suppress(Exception):
                if parent_phase is None and self._progress is None:
                    self._whole, self._left = phase_name, num_steps
                    self._progress = Progress("building an engine", num_steps, "steps")
                elif self._progress is not None:
                    self._progress.advance(0, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock, suppress(Exception):
                if self._progress is not None and phase_name == self._whole:
                    self._left -= 1
                    self._progress.advance()
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock, suppress(Exception):
                if self._progress is not None and phase_name == self._whole:
                    if not cancelled.is_set():
                        self._progress.advance(self._left)  # libraries leave the last steps out
                    self._progress.close()
                    self._progress = None

    return Monitor()


def _join(errors: list[str]) -> str:
    return "; ".join(errors[:_MOST_ERRORS]) or "no reason given"
