"""Tuning state on disk: safetensors, with everything that is no tensor as JSON in the header."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import safetensors_metadata, write_bytes


@dataclass(frozen=True)
class TuningState:
    """The progress of a tuning after an epoch."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_nll: float | None = None  # on validation images, nats; None without any
    history: tuple[Mapping[str, float], ...] = field(default=())  # one entry an epoch

    @property
    def epochs_since_best(self) -> int:
        """Return the number of epochs since the best one."""
        return self.epoch - self.best_epoch


def save_checkpoint(
    path: Path,
    module: nn.Module,
    state: TuningState,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write parameters, and if given the optimizer's state and further tensors, atomically."""
    tensors = {f"module.{name}": value.detach() for name, value in module.state_dict().items()}
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    on_cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(on_cpu, metadata={"state": json.dumps(asdict(state))}))


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[TuningState, dict[str, Tensor]]:
    """Load a checkpoint into `module` and `optimizer`.

    Returns:
        The state, and the further tensors that were saved.

    Raises:
        RunError: the file is missing, damaged, or belongs to another module.
    """
    try:
        content = path.read_bytes()  # safetensors opens no path that is not UTF-8
        tensors = load(content)
        values = json.loads(safetensors_metadata(content, str(path), RunError)["state"])
        state = TuningState(**{**values, "history": tuple(values["history"])})
        module.load_state_dict(part_of(tensors, "module"))
        if optimizer is not None:
            _load_optimizer(optimizer, part_of(tensors, "optimizer"))
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as cause:
        reason = shorten(str(cause), 300)
        raise RunError(f"{path}: not a checkpoint of this run ({reason})") from cause
    return state, part_of(tensors, "extra")


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, named without it."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
