"""Which backend really works here, and why the faster ones do not."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TypeVar

from capt_deploy.backends.onnxruntime import import_library
from capt_deploy.core.errors import BackendError, CaptError, UnavailableError
from capt_deploy.core.gpus import gpu_problem, nvidia_gpu_is_here
from capt_deploy.core.install import install_hint

T = TypeVar("T")


def first_that_works(
    names: Sequence[str], start: Callable[[str], T]
) -> tuple[T, Mapping[str, str]]:
    """Start the first of some backends that can be started here.

    A single name is started or its error raised. Among several, whatever keeps one from starting
    is the reason why it is skipped: libraries for GPUs fail in many ways. One that is installed and
    still fails is warned of.

    Args:
        names: of `capt_deploy.backends.AUTO`, the fastest first.
        start: starts one by name.

    Returns:
        What was started, and by name why those before it were not.

    Raises:
        BackendError: none can be started; the error is that of the last one.
        CaptError: the bundle itself cannot be used.
    """
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}  # those that should have worked
    for name in names[:-1]:
        reason = why_not(name)
        if reason is None:
            try:
                started = start(name)
            except BackendError as error:
                reason = failed[name] = str(error)
            except CaptError:
                raise
            except Exception as error:
                reason = failed[name] = f"{type(error).__name__}: {error}"
            else:
                if failed:
                    warnings.warn(f"{name} is used, as {_listed(failed)}", stacklevel=4)
                return started, skipped
        skipped[name] = reason
    started = _last(names[-1], start, skipped)
    if skipped and nvidia_gpu_is_here():
        warnings.warn(
            f"an NVIDIA GPU is here, but the CPU is used: {_listed(skipped)}", stacklevel=4
        )
    return started, skipped


def _last(name: str, start: Callable[[str], T], skipped: Mapping[str, str]) -> T:
    try:
        return start(name)
    except BackendError as error:
        if not skipped:
            raise
        raise type(error)(f"{error} (others cannot run either: {_listed(skipped)})") from error


def _listed(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items())


def why_not(name: str) -> str | None:
    """Return why a backend cannot run here, as far as can be told before it is started.

    Raises nothing: it is asked so that no graph is read for a library that is not there.
    """
    if name == "onnxruntime-cpu":
        return None
    missing = cuda_provider_problem() if name == "onnxruntime-cuda" else _missing_module(name)
    return missing or gpu_problem()


def _missing_module(name: str) -> str | None:
    module = name.replace("-", "_")
    if find_spec(module) is not None:
        return None
    return f"expected the package {module}, found none; {install_hint(name)}"


def cuda_provider_problem() -> str | None:
    """Return why this ONNX Runtime has no CUDA provider, with the fix; None if it has one."""
    try:
        found = import_library().get_available_providers()
    except UnavailableError as error:
        return str(error)
    if "CUDAExecutionProvider" in found:
        return None
    return (
        f"expected CUDAExecutionProvider, found {', '.join(found)}: this package is for the CPU "
        f"alone; pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def require(name: str) -> None:
    """Raise what `why_not` says.

    Raises:
        UnavailableError: the backend cannot run here.
    """
    if (reason := why_not(name)) is not None:
        raise UnavailableError(f"backend {name}: {reason}")
