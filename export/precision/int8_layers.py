"""Layers that hold int8 weights and round what they read to int8: what a graph's Q/DQ pairs do.

Zero points are 0, for TensorRT takes no others. Scales are numbers that half precision holds, and
codes are made with these very numbers, so nothing changes when a network is lowered.
"""

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127  # of the codes; weights use −127 to 127
_SMALLEST_SCALE = 2.0**-24  # above 0 in half precision


class Int8Layer(nn.Module):
    """A linear layer or convolution with a scale for its input and one for each output."""

    input_scale: Tensor
    zero: Tensor

    def __init__(self, source: nn.Linear | nn.Conv2d) -> None:
        """Prepare the input's rounding; `set_range` has to follow."""
        super().__init__()
        device = source.weight.device
        self.register_buffer("input_scale", torch.ones((), device=device))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8, device=device))

    def set_range(self, largest: float) -> None:
        """Let the codes of the input reach up to `largest`."""
        self.input_scale.fill_(half_scale(torch.tensor(largest / LARGEST)))

    def forward(self, values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return the layer's outputs for rounded inputs."""
        return self.outputs(_rounded(values, self.input_scale, self.zero))

    def outputs(self, values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return the layer's outputs with its rounded weights."""
        raise NotImplementedError


class Int8Linear(Int8Layer):
    """An `nn.Linear`."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source)
        # TensorRT pulls query, key and value out of a product of all three, and in doing so turns
        # it to half precision; three products it puts together, and they stay int8.
        parts = 3 if source.out_features == 3 * source.in_features else 1
        weights = source.weight.detach().chunk(parts)
        biases = [None] * parts if source.bias is None else source.bias.detach().chunk(parts)
        # Inputs first, as a product of matrices reads them: no transposition is left in the graph.
        both = zip(weights, biases, strict=True)
        self.parts = nn.ModuleList(_Weight(weight, bias, axis=1) for weight, bias in both)

    def outputs(self, values: Tensor) -> Tensor:  # noqa: D102
        parts = []
        for part in self.parts:
            product = values @ part()
            parts.append(product if part.bias is None else product + part.bias)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


class Int8Convolution(Int8Layer):
    """An `nn.Conv2d`."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__(source)
        bias = None if source.bias is None else source.bias.detach()
        self.weight = _Weight(source.weight.detach(), bias, axis=0)
        self._stride, self._padding = source.stride, source.padding
        self._dilation, self._groups = source.dilation, source.groups

    def outputs(self, values: Tensor) -> Tensor:  # noqa: D102
        geometry: Any = (self._stride, self._padding, self._dilation, self._groups)
        return functional.conv2d(values, self.weight(), self.weight.bias, *geometry)


class _Weight(nn.Module):
    """A weight as codes with a scale for each output, and the bias that goes with it."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Float[Tensor, "outputs *inputs"], bias: Tensor | None, axis: int
    ) -> None:
        """Round the weight; `axis` is where the outputs are to be: 0, or 1 of a matrix."""
        super().__init__()
        self._axis = axis
        scales = half_scale(weight.float().flatten(1).abs().amax(dim=1) / LARGEST)
        codes = weight.float() / scales.view(-1, *[1] * (weight.dim() - 1))
        codes = codes.round().clamp(-LARGEST, LARGEST).to(torch.int8)
        self.register_buffer("codes", codes.transpose(0, axis).contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self) -> Float[Tensor, "..."]:
        """Return the weight, in the scales' type."""
        return _dequantised(self.codes, self.scales, self._axis)


def can_be_int8(layer: nn.Module) -> bool:
    """Say whether there is an int8 form; a subclass may compute something else."""
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.padding_mode == "zeros"  # others pad by themselves
    )


def int8_layer(layer: nn.Module) -> Int8Layer:
    """Return the int8 form of a float32 layer that has one."""
    if isinstance(layer, nn.Conv2d):
        return Int8Convolution(layer)
    assert isinstance(layer, nn.Linear)
    return Int8Linear(layer)


def half_scale(scale: Float[Tensor, "*outputs"]) -> Float[Tensor, "*outputs"]:
    """Return the nearest numbers above 0 that half precision holds, as float32."""
    return scale.clamp(min=_SMALLEST_SCALE).half().float()


def fake_quantised(
    values: Float[Tensor, "*axes"], scale: Float[Tensor, ""]
) -> Float[Tensor, "*axes"]:
    """Return float32 values as they come back from int8; a tie goes to the even code."""
    return (values / scale).round_().clamp_(-LARGEST - 1, LARGEST).mul_(scale)


def _rounded(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if not torch.onnx.is_in_onnx_export():
        return fake_quantised(values.float(), scale.float()).to(values.dtype)
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, scale, zero), dtype=torch.int8, shape=values.shape
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, scale, zero), dtype=scale.dtype, shape=values.shape
    )


def _dequantised(
    codes: Int8[Tensor, "*axes"], scales: Float[Tensor, " outputs"], axis: int
) -> Float[Tensor, "*axes"]:
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, scales),
            {"axis": axis},
            dtype=scales.dtype,
            shape=codes.shape,
        )
    others = [1] * codes.dim()
    others[axis] = -1
    return (codes.float() * scales.float().view(others)).to(scales.dtype)
