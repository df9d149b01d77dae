"""Lower a network's precision in torch, before it is traced, with islands of float32.

A converter of ONNX files sees operators only; here norms are known as such. TensorRT's strongly
typed networks run the graph's own types.
"""

from typing import Any

import torch
from torch import Tensor, nn

FP32, FP16, BF16, INT8 = "fp32", "fp16", "bf16", "int8"
PRECISIONS = (FP32, FP16, BF16, INT8)
INT8_CPU = "int8-cpu"  # comes with INT8: CPUs have no arithmetic of half precision
# The type of everything but islands and int8 layers.
DTYPES = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16, INT8: torch.float16}

# Their sums of squares overflow half precision, and their differences lose its few digits.
_NORMS: tuple[type[nn.Module], ...] = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    nn.modules.batchnorm._BatchNorm,
)


class Float32(nn.Module):
    """A module that computes in float32 and returns the type of its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor, *further: Any) -> Tensor:
        """Run `inner` in float32."""
        wide: Tensor = self.inner(values.float(), *further)
        return wide.to(values.dtype)


def lower(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn weights and buffers to `dtype`, in place; norms become islands of float32."""
    for name, child in module.named_children():
        if isinstance(child, _NORMS):
            setattr(module, name, Float32(child))
        else:
            lower(child, dtype)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
