"""Choose the fastest backend that works here, and say why faster ones do not."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from capt_deploy.backends.spec import BackendSpec
from capt_deploy.core.errors import BackendError, CaptError
from capt_deploy.core.gpus import nvidia_gpu_is_here

T = TypeVar("T")


def first_that_works(
    specs: Sequence[BackendSpec], start: Callable[[BackendSpec], T]
) -> tuple[T, Mapping[str, str]]:
    """Start the first of several backends that starts here.

    A single backend starts, or its own error is raised. Among several, any exception is a reason
    to try the next one, because libraries for GPUs fail in many ways; a warning names backends that
    are installed and fail.

    Args:
        specs: the fastest first.
        start: starts a backend.

    Returns:
        The result of `start`, and by name the reasons why faster backends are not used.

    Raises:
        BackendError: no backend starts; the error is that of the last one.
        CaptError: the bundle itself cannot be used.
    """
    *faster, last = specs
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}  # installed, and should have worked
    for spec in faster:
        reason = spec.problem()
        if reason is None:
            try:
                started = start(spec)
            except BackendError as error:
                reason = failed[spec.name] = str(error)
            except CaptError:
                raise
            except Exception as error:
                reason = failed[spec.name] = f"{type(error).__name__}: {error}"
            else:
                _warn(specs, spec, skipped, failed)
                return started, skipped
        skipped[spec.name] = reason
    try:
        started = start(last)
    except BackendError as error:
        if not skipped:
            raise
        raise type(error)(f"{error} (others cannot run either: {_listed(skipped)})") from error
    _warn(specs, last, skipped, failed)
    return started, skipped


def _warn(
    specs: Sequence[BackendSpec],
    used: BackendSpec,
    skipped: Mapping[str, str],
    failed: Mapping[str, str],
) -> None:
    on_gpu = {spec.name for spec in specs if spec.needs_gpu}
    if not used.needs_gpu and on_gpu & skipped.keys() and nvidia_gpu_is_here():
        text = f"an NVIDIA GPU is here, but the CPU is used: {_listed(skipped)}"
    elif failed:
        text = f"{used.name if used.needs_gpu else 'the CPU'} is used, as {_listed(failed)}"
    else:
        return
    warnings.warn(text, stacklevel=4)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
