"""Lower a network's precision in torch, before it is traced, with islands of float32.

A converter of ONNX files sees operators; here it is known which layers are norms, and TensorRT's
strongly typed networks run just what the graph says.
"""

from typing import Any

import torch
from torch import Tensor, nn

FP32, FP16, BF16, INT8 = "fp32", "fp16", "bf16", "int8"
PRECISIONS = (FP32, FP16, BF16, INT8)
# What a graph of each precision computes in where nothing else is said.
DTYPES = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16, INT8: torch.float16}

# Their sums of squares overflow half precision, and their differences lose its few digits.
_NORMS: tuple[type[nn.Module], ...] = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    nn.modules.batchnorm._BatchNorm,
)


class Float32(nn.Module):
    """An island: what comes is widened, what goes has the type that came."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor, *others: Any) -> Tensor:
        """Run `inner` in float32."""
        wide: Tensor = self.inner(values.float(), *others)
        return wide.to(values.dtype)


def lower(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn weights and buffers to `dtype`, in place; norms become islands and keep float32."""
    for name, child in module.named_children():
        if isinstance(child, _NORMS):
            setattr(module, name, Float32(child))
        else:
            lower(child, dtype)
    for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if own.is_floating_point():
            own.data = own.data.to(dtype)
