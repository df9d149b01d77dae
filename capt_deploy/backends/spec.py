"""The table of backends. Reading it imports none of their libraries.

To add a backend, write its file (see `base.Backend`) and give it an entry in `BACKENDS`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_problem
from capt_deploy.core.install import install_hint

if TYPE_CHECKING:
    from capt_deploy.backends.base import Backend

AUTO = "auto"  # the name that stands for all backends
Advice = Callable[["BackendSpec", Mapping[str, str], Collection[int]], str | None]
_ROOM = "capt_deploy.backends"


@dataclass(frozen=True)
class BackendSpec:
    """A backend as the rest of the package sees it, before its library is imported.

    `factory`, `check` and `advice` are written as "module:name" and imported when they are used.
    """

    name: str  # as in --backend
    module: str  # import name of the library
    packages: tuple[str, ...]  # distributions that contain the library; any one of them
    factory: str  # returns the backend; arguments as described at `base.Backend`
    precisions: tuple[str, ...]  # the best suited first
    tried: tuple[str, ...] = ()  # of these, what `auto` compares by measuring, on CPUs
    extra: str | None = None  # of capt, which installs the library; None: every install has it
    oldest: tuple[int, int] = (0, 0)  # version of the library that works
    needs_gpu: bool = False  # whether it needs an NVIDIA GPU
    group: str | None = None  # a name that stands for several backends, tried in order
    builds_engines: bool = False  # whether capt-build can build TensorRT engines for it
    portable_engines: bool = False  # whether engines can be built for GPUs of other machines
    check: str | None = None  # returns why the installed library cannot be used, or None
    advice: str | None = None  # an `Advice`: what `fix` returns, or None for the usual fix

    @property
    def install(self) -> str:
        """Return the command that installs the library."""
        return install_hint(self.extra) if self.extra else f"pip install {self.packages[0]}"

    def problem(self) -> str | None:
        """Return why the backend cannot run here, as far as is known before it is opened."""
        if find_spec(self.module) is None:
            return f"expected the package {self.module}, found none; {self.install}"
        if self.check is not None and (reason := _resolve(self.check)()) is not None:
            return str(reason)
        return gpu_problem() if self.needs_gpu else None

    def open(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> "Backend":
        """Start the backend on a graph.

        Args:
            onnx: the graph.
            precision: of the graph.
            weights_folder: folder of weights that are not in the graph's own file.
            options: how to use the machine.

        Raises:
            UnavailableError: this machine cannot run the backend.
            BackendError: the backend cannot run this graph.
        """
        if (reason := self.problem()) is not None:
            raise UnavailableError(f"backend {self.name}: {reason}")
        backend: Backend = _resolve(self.factory)(onnx, precision, weights_folder, options)
        return backend

    def worth_trying(self, available: Collection[str]) -> tuple[str, ...]:
        """Return the available precisions that may be the fastest; () where none suits."""
        suitable = tuple(name for name in self.precisions if name in available)
        return tuple(name for name in suitable if name in self.tried) or suitable[:1]

    def preferred(self, available: Iterable[str]) -> str:
        """Return the available precision that suits the backend best.

        Raises:
            BackendError: none does.
        """
        names = list(available)
        for precision in self.precisions:
            if precision in names:
                return precision
        raise BackendError(
            f"backend {self.name}: expected a graph in {', '.join(self.precisions)}, came "
            f"{', '.join(names)}; export the run again, with --{self.precisions[0]}"
        )

    def fix(self, installed: Mapping[str, str], sms: Collection[int]) -> str:
        """Return the command that most likely makes the backend work.

        Args:
            installed: versions of installed distributions, by name.
            sms: compute capabilities of the GPUs, such as 89 for 8.9.
        """
        if self.advice is not None:
            advise: Advice = _resolve(self.advice)
            if (text := advise(self, installed, sms)) is not None:
                return text
        package = next((name for name in self.packages if name in installed), None)
        return f"pip install --upgrade --force-reinstall {package}" if package else self.install


def _resolve(reference: str) -> Any:
    """Import and return what "module:name" names."""
    module, name = reference.split(":")
    return getattr(import_module(module), name)


# On GPUs half precision is faster and loses nothing. CPUs have no arithmetic of float16.
_GPU_PRECISIONS = ("fp16", "bf16", "fp32", "int8")

TENSORRT = BackendSpec(
    name="tensorrt",
    module="tensorrt",
    packages=("tensorrt",),
    extra="tensorrt",
    factory=f"{_ROOM}.tensorrt.backend:TensorRT",
    precisions=_GPU_PRECISIONS,
    oldest=(10, 3),  # of JetPack 6; tests/capt_deploy/backends/tensorrt/test_versions.py
    needs_gpu=True,
    builds_engines=True,
    advice=f"{_ROOM}.tensorrt.backend:advise",
)
TENSORRT_RTX = BackendSpec(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    packages=("tensorrt-rtx",),
    extra="tensorrt-rtx",
    factory=f"{_ROOM}.tensorrt.backend:TensorRTRTX",
    precisions=_GPU_PRECISIONS,
    oldest=(1, 0),
    needs_gpu=True,
    builds_engines=True,
    portable_engines=True,
    advice=f"{_ROOM}.tensorrt.backend:advise",
)
ONNXRUNTIME_CUDA = BackendSpec(
    name="onnxruntime-cuda",
    module="onnxruntime",
    packages=("onnxruntime-gpu", "onnxruntime"),
    factory=f"{_ROOM}.onnxruntime_cuda:OnnxRuntimeCuda",
    precisions=("fp16", "fp32", "bf16", "int8"),
    needs_gpu=True,
    group="onnxruntime",
    check=f"{_ROOM}.onnxruntime:cuda_provider_problem",
    advice=f"{_ROOM}.onnxruntime:advise",
)
OPENVINO = BackendSpec(
    name="openvino",
    module="openvino",
    packages=("openvino",),
    extra="openvino",
    factory=f"{_ROOM}.openvino:OpenVino",
    precisions=("fp32", "bf16", "int8-cpu", "fp16", "int8"),
    tried=("fp32", "bf16", "int8-cpu"),
)
ONNXRUNTIME_CPU = BackendSpec(
    name="onnxruntime-cpu",
    module="onnxruntime",
    packages=("onnxruntime", "onnxruntime-gpu"),
    factory=f"{_ROOM}.onnxruntime:OnnxRuntime",
    precisions=("fp32", "int8-cpu", "fp16", "int8"),
    tried=("fp32", "int8-cpu"),
    group="onnxruntime",
    advice=f"{_ROOM}.onnxruntime:advise",
)

# Those for GPUs first: the order in which `auto` tries them. Those for CPUs it measures.
BACKENDS: tuple[BackendSpec, ...] = (
    TENSORRT,
    TENSORRT_RTX,
    ONNXRUNTIME_CUDA,
    OPENVINO,
    ONNXRUNTIME_CPU,
)


def backend_names() -> tuple[str, ...]:
    """Return all names that `find_backends` takes."""
    names = [AUTO]
    for spec in BACKENDS:
        names += [spec.group, spec.name] if spec.group else [spec.name]
    return tuple(dict.fromkeys(names))


def find_backends(name: str = AUTO) -> tuple[BackendSpec, ...]:
    """Return the backends that a name stands for, those for GPUs first.

    Raises:
        BackendError: the name is unknown.
    """
    specs = tuple(spec for spec in BACKENDS if name in (AUTO, spec.name, spec.group))
    if not specs:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(backend_names())}")
    return specs


def library_packages() -> tuple[str, ...]:
    """Return the distributions that contain the libraries of all backends."""
    return tuple(dict.fromkeys(name for spec in BACKENDS for name in spec.packages))
