"""Several processes under `torchrun`, all of which run the whole of `capt-train` in step.

Only what costs is divided: the images to embed, the classes that a step's text tower encodes, and
the images that its vision tower encodes. The parts are joined before the loss, so every process
has the whole minibatch, and the loss is that of one process. Each process has all parameters.
Outside of `processes`, and in a single process, all functions give back what they are given.

`torch.distributed` is used directly: it comes with torch, and what is divided is the work inside a
step. Trainers such as Lightning Fabric divide the minibatch, whose loss would not be that of one.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capt_deploy.core.errors import ModelError, RunError

T = TypeVar("T")
_Rows = TypeVar("_Rows", list[int], Tensor)
_together = False  # set by `processes`; a process group of the caller is not ours
_LONGEST_WAIT = timedelta(days=1)  # for the first process; torchrun ends all when one fails


@contextmanager
def processes() -> Iterator[None]:
    """Work with the other processes that torchrun has started; only the first one prints.

    When one process fails, it alone raises its error, and all others exit with 2.

    Raises:
        RunError: another process was killed.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_LONGEST_WAIT
    )
    global _together  # noqa: PLW0603
    _together = True
    try:
        with ExitStack() as silence:
            if not is_first():
                nowhere = silence.enter_context(Path(os.devnull).open("w"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield
    except BaseException as error:
        if not _is_first_failure():
            raise SystemExit(2) from error
        if isinstance(error, dist.DistError) or "by peer" in str(error):
            raise RunError(
                "another process of torchrun was killed; expected all to run to the end; continue "
                "with --resume"
            ) from error
        raise
    finally:
        _together = False
    dist.destroy_process_group()


def _is_first_failure() -> bool:
    """Tell whether no other process has failed before, and count the failure."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
        failures: int = store.add(f"capt-failures-{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1)
    except (dist.DistError, RuntimeError):  # its host has ended
        return False
    return failures == 1


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together else 1


def _place() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Tell whether this process writes the run folder and prints."""
    return _place() == 0


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: with several, each has a GPU for itself.

    Raises:
        ModelError: a single GPU was asked for, or there are too few.
    """
    if count() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ModelError(
            f"device {str(device)!r}: torchrun gives each process a GPU; expected auto or cuda"
        )
    place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= gpus:
        raise ModelError(
            f"torchrun: expected at most {gpus} processes on this machine, one for each GPU; "
            f"came {os.environ['LOCAL_WORLD_SIZE']}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def agreed(value: T) -> T:
    """Return the first process's value, as decisions need it: GPUs differ in the last digits."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def by_first(compute: Callable[[], T]) -> T:
    """Run `compute` in the first process alone, and return its result in all."""
    values: Any = agreed([compute()] if is_first() else None)
    return values[0]  # type: ignore[no-any-return]


def split_items(items: Sequence[T], batch: int) -> Sequence[T]:
    """Return the items that this process works on: whole batches, as one process has them."""
    size = -(-len(items) // (batch * count())) * batch
    return items[_place() * size :][:size]


def gather_items(value: T) -> list[T]:
    """Return the value of each process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def split_rows(rows: _Rows) -> _Rows:
    """Return the rows that this process encodes for `gather_rows`, equally many in each process."""
    if count() == 1:
        return rows
    size = -(-len(rows) // count())
    part, last = rows[_place() * size :][:size], rows[-1:]
    for _ in range(size - len(part)):
        part = torch.cat([part, last]) if isinstance(part, Tensor) else part + last
    return part


def gather_rows(encoded: Tensor, total: int, dim: int = 0) -> Tensor:
    """Return the encoded rows of all processes; gradients reach those of this one.

    Args:
        encoded: one for each row of `split_rows`, along `dim`.
        total: the number of all rows.
        dim: the axis of the rows.
    """
    if count() == 1:
        return encoded
    if encoded.requires_grad:
        # `averaged` divides by the number of processes. Gradients before the join are partial and
        # must be summed, so multiply here; those behind it are equal everywhere.
        encoded.register_hook(lambda gradient: gradient * count())
    values = encoded.detach().contiguous()
    parts = [torch.empty_like(values) for _ in range(count())]
    dist.all_gather(parts, values)
    parts[_place()] = encoded
    return torch.cat(parts, dim).narrow(dim, 0, total)


def averaged(gradients: list[Tensor]) -> list[Tensor]:
    """Return the means over the processes."""
    if count() == 1 or not gradients:
        return gradients
    total = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(total)
    parts = (total / count()).split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def agree_on(fitted: nn.Module) -> None:
    """Give a module the first process's parameters and buffers."""
    if count() > 1:
        for values in fitted.state_dict().values():
            first = values.contiguous()
            dist.broadcast(first, 0)
            values.copy_(first)
