"""Build TensorRT engines from ONNX. The only file that imports `tensorrt` or `tensorrt_rtx`.

Both have the same Python API. There is no precision to choose here: networks are strongly typed,
that is, every tensor has the type that the ONNX file gives it. TensorRT-RTX builds for a named
generation of GPUs and needs none itself; TensorRT builds for the GPU it runs on.
"""

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from capt_deploy.backends.batch_sizes import BATCHES, check_batches
from capt_deploy.backends.tensorrt.progress import make_monitor
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.install import install_hint

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # module: extra to install

_OLDEST = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 0)}  # from which on networks have types
_MOST_ERRORS = 8  # shown of a graph with many unsupported nodes
_MOST_KEPT = 64  # errors of a process that runs for long
_one_build = threading.Lock()  # one logger serves the whole process: whose error is it?


@dataclass
class Timings:
    """What TensorRT has measured of kernels on this GPU; a build reads it and adds to it."""

    data: bytes = b""


def build_engine(
    onnx: bytes,
    *,
    library: str = "tensorrt_rtx",
    sm: int | None = None,
    batches: tuple[int, int, int] = BATCHES,
    weights_folder: Path | None = None,
    timings: Timings | None = None,
    cancelled: threading.Event | None = None,
) -> bytes:
    """Build an engine; slow, and nothing is cached.

    Args:
        onnx: a graph whose inputs have a free first axis, the batch, or none.
        library: `tensorrt_rtx` or `tensorrt`.
        sm: compute capability to build for, such as 89 for 8.9; only of TensorRT-RTX, which
            otherwise builds for all GPUs that it knows from Ampere (80) on.
        batches: smallest, usual and largest batch; the usual one runs best.
        weights_folder: where files of external weights lie, if the graph has some.
        timings: of TensorRT alone, to make the next build faster; TensorRT-RTX measures nothing.
        cancelled: once it is set, the build ends soon, with an error; progress is shown with it.

    Returns:
        The engine, for this version of the library.

    Raises:
        BackendError: the library is missing, or cannot build this graph for that GPU.
    """
    check_batches(batches)
    trt = load_library(library)
    with _one_build:
        errors = make_logger(library).listen()
        builder = _start("Builder", library)
        network = builder.create_network(_strongly_typed(trt))
        # The parser owns the weights: it has to live until the engine is built.
        parser = trt.OnnxParser(network, make_logger(library))
        _parse(parser, onnx, weights_folder, library)
        config = builder.create_builder_config()
        # float32 as the gate has seen it; who wants speed has half precision.
        config.clear_flag(trt.BuilderFlag.TF32)
        _add_profile(builder, config, network, batches)
        if sm is not None:
            _target(trt, config, sm, library)
        engine = _run(trt, builder, network, config, timings, cancelled)
        if engine is None:
            gpu = "" if sm is None else f" for SM{sm}"
            raise BackendError(f"{library} cannot build the graph{gpu}: {_join(errors())}")
        return bytes(engine)


def load_library(library: str) -> Any:
    """Import `tensorrt_rtx` or `tensorrt`.

    Raises:
        BackendError: it is neither.
        UnavailableError: it is not installed, does not load, or is too old.
    """
    if library not in LIBRARIES:
        raise BackendError(f"library {library!r}: expected one of {', '.join(LIBRARIES)}")
    extra = LIBRARIES[library]
    try:
        trt = importlib.import_module(library)
    except ModuleNotFoundError as cause:
        raise UnavailableError(f"{library} is missing; {install_hint(extra)}") from cause
    except Exception as cause:  # a library that does not fit this machine fails in many ways
        raise UnavailableError(f"{library} is installed but does not load: {cause}") from cause
    oldest = _OLDEST[library]
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < oldest:
        raise UnavailableError(
            f"{library}: expected {'.'.join(map(str, oldest))} or newer, came {trt.__version__}; "
            f"{install_hint(extra)}"
        )
    return trt


@cache
def make_logger(library: str) -> Any:
    """Return the one logger of a library: it prints nothing and keeps errors; see `listen`."""
    trt = load_library(library)
    base: Any = trt.ILogger
    worth_keeping = (base.ERROR, base.INTERNAL_ERROR)

    class Errors(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # its bindings know no super()
            self._numbers = count()
            self._last: deque[tuple[int, str]] = deque(maxlen=_MOST_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in worth_keeping:
                self._last.append((next(self._numbers), " ".join(message.split())))

        def listen(self) -> Callable[[], list[str]]:
            """Return a function that returns the errors that came since now."""
            start = next(self._numbers)
            return lambda: [text for number, text in list(self._last) if number > start]

    return Errors()


def start_runtime(library: str) -> Any:
    """Return an `IRuntime`, which loads engines.

    Raises:
        UnavailableError: the library does not work with this GPU and driver.
    """
    return _start("Runtime", library)


def _start(kind: str, library: str) -> Any:
    """Make a `Builder` or a `Runtime`."""
    logger = make_logger(library)
    errors = logger.listen()
    try:
        return getattr(load_library(library), kind)(logger)
    except Exception as cause:  # TensorRT's own way to say that there is no GPU or driver
        reasons = _join([*errors(), str(cause)])
        raise UnavailableError(f"{library} cannot start: {reasons}") from cause


def _strongly_typed(trt: Any) -> int:
    """Return the flags of a network; TensorRT 10 has other networks as well."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, onnx: bytes, weights_folder: Path | None, library: str) -> None:
    # The parser takes the name of a file beside which other files lie, and else would look for
    # them in the current folder: whatever lies there is none of a graph's business.
    folder = Path(os.devnull) / "none" if weights_folder is None else weights_folder
    if parser.parse(onnx, str(folder / "model.onnx")) and not parser.num_errors:
        return
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    shown = [_describe(error) for error in found[:_MOST_ERRORS]] or ["no reason given"]
    if len(found) > _MOST_ERRORS:
        shown.append(f"and {len(found) - _MOST_ERRORS} more")
    raise BackendError(f"{library} cannot read the graph: {'; '.join(shown)}")


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


def _run(
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    timings: Timings | None,
    cancelled: threading.Event | None,
) -> Any:
    """Return the engine in the library's memory, or None."""
    # Neither the monitor nor the timings belong to the configuration: both have to stay here.
    monitor = None if cancelled is None else make_monitor(trt, cancelled)
    if monitor is not None:
        config.progress_monitor = monitor
    measured = None if timings is None else _use_timings(config, timings)
    engine = builder.build_serialized_network(network, config)
    if engine is not None and timings is not None and measured is not None:
        timings.data = bytes(measured.serialize())
    return engine


def _use_timings(config: Any, timings: Timings) -> Any:
    """Return the library's own form of the timings; one from another GPU or version starts anew."""
    for data in (timings.data, b""):
        measured = config.create_timing_cache(data)
        if measured is not None and config.set_timing_cache(measured, False):
            return measured
    return None


def _target(trt: Any, config: Any, sm: int, library: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    names = [] if known is None else list(known.__members__)
    numbers = sorted(int(name[2:]) for name in names if name.startswith("SM"))
    if not numbers:
        raise BackendError(f"{library} builds only for the GPU it runs on; leave SM {sm} out")
    if sm not in numbers:
        raise UnavailableError(f"{library}: SM {sm} is not one of {', '.join(map(str, numbers))}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(known, f"SM{sm}"), 0):
        raise BackendError(f"{library}: SM {sm} cannot be built for here")


def _join(errors: list[str]) -> str:
    return "; ".join(errors[:_MOST_ERRORS]) or "no reason given"
