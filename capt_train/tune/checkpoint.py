"""Tuning state as safetensors: tensors as they are, everything else as JSON in the header."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import write_bytes


@dataclass(frozen=True)
class TuningState:
    """Where the tuning stands after an epoch."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_nll: float | None = None  # on validation, nats; None where there is none
    history: tuple[Mapping[str, float], ...] = field(default=())  # one entry an epoch

    @property
    def epochs_since_best(self) -> int:
        """How many epochs have passed without a better one."""
        return self.epoch - self.best_epoch


def save_checkpoint(
    path: Path,
    module: nn.Module,
    state: TuningState,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write parameters and, if given, the optimizer's own and further tensors, atomically."""
    tensors = {f"module.{name}": value.detach() for name, value in module.state_dict().items()}
    if optimizer is not None:
        for index, own in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in own.items()}
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(cpu, metadata={"state": json.dumps(asdict(state))}))


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[TuningState, dict[str, Tensor]]:
    """Load what `save_checkpoint` wrote into `module` and `optimizer`.

    Returns:
        The state, and the further tensors.

    Raises:
        RunError: the file is missing, damaged, or belongs to another module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            raw = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = TuningState(**{**raw, "history": tuple(raw["history"])})
        module.load_state_dict(part_of(tensors, "module"))
        if optimizer is not None:
            _load_optimizer(optimizer, part_of(tensors, "optimizer"))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as cause:
        reason = shorten(str(cause), 300)
        raise RunError(f"{path}: not a checkpoint of this run ({reason})") from cause
    return state, part_of(tensors, "extra")


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix.`, without it."""
    start = prefix + "."
    return {name[len(start) :]: of for name, of in tensors.items() if name.startswith(start)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    own: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        own.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": own, "param_groups": groups})
