"""Autocast for the towers on a GPU; loss terms stay in float32 (METHOD 6)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from capt_train.parallel import averaged

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, gradient scaling and clipping of a training step."""

    def __init__(self, autocast: str, device: torch.device) -> None:
        """Choose the type; `auto` is bf16 on GPUs that support it, else float32."""
        if autocast == "auto":
            supported = device.type == "cuda" and torch.cuda.is_bf16_supported(
                including_emulation=False
            )
            autocast = "bf16" if supported else "off"
        self._device, self._dtype = device, _TYPES.get(autocast)
        # fp16 gradients underflow unless the loss is scaled up
        self._scaler = torch.amp.GradScaler(device.type, enabled=autocast == "fp16")

    def towers(self) -> AbstractContextManager[object]:
        """Return the autocast context of the towers' forward pass."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def step(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        clip_norm: float,
        guides: Sequence[Tensor] | None = None,
    ) -> bool:
        """Take an optimizer step; return False, with nothing changed, if a gradient is not finite.

        With fp16 such a step is skipped and True returned while the loss scale can still be
        lowered, because that is how the scaler finds its scale.

        Args:
            loss: to be lowered.
            optimizer: of the parameters.
            parameters: what is trained.
            clip_norm: largest norm of the gradient; 0 for any.
            guides: gradients of a `scaled` loss, one for each parameter, that no step may oppose;
                see `project`.
        """
        optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = averaged([p.grad for p in trained if p.grad is not None])
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        self._scaler.unscale_(optimizer)
        if guides is not None:
            guides = [guide / self._scaler.get_scale() for guide in guides]
            if all(torch.isfinite(guide).all() for guide in guides):
                project(parameters, guides)
            elif self._scaler.get_scale() <= 1:
                return False
            else:  # as for the gradient itself: no step, and a smaller scale
                self._scaler.update(self._scaler.get_scale() / 2)
                return True
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
        if not torch.isfinite(norm) and self._scaler.get_scale() <= 1:  # 1 without fp16
            return False
        self._scaler.step(optimizer)
        self._scaler.update()
        return True

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss times the scale that keeps gradients of fp16 from underflow."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def state(self) -> dict[str, Tensor]:
        """Return the scaler's state for a resumed run; empty without fp16."""
        return {name: torch.tensor(value) for name, value in self._scaler.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore a state returned by `state`."""
        if state:
            self._scaler.load_state_dict({name: value.item() for name, value in state.items()})


def project(parameters: Sequence[nn.Parameter], guides: Sequence[Tensor]) -> None:
    """Take from each gradient what opposes its guide: ProGrad (arXiv 2205.14865), λ = 1.

    `G ← G − (G·G_g/‖G_g‖²)·G_g` where `G·G_g < 0`; else G stays. As in the authors' code, each
    parameter is projected by itself.
    """
    for parameter, guide in zip(parameters, guides, strict=True):
        if parameter.grad is None:
            continue
        along = (parameter.grad * guide).sum()
        if along < 0:
            parameter.grad -= along / guide.square().sum() * guide
