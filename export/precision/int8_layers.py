"""Layers with int8 weights and int8 inputs: the torch form of a graph's Q/DQ pairs.

Zero points are 0, for TensorRT takes no others; `use_unsigned_inputs` is for CPUs. Scales are
representable in half precision, and codes are made with these very scales, so lowering a network
changes neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127  # of the codes; weights use −127 to 127
_SMALLEST_SCALE = 2.0**-24  # above 0 in half precision


class Int8Layer(nn.Module):
    """A linear layer or convolution with a scale for its input and a scale for each output."""

    input_scale: Tensor
    zero: Tensor

    def __init__(self, source: nn.Linear | nn.Conv2d) -> None:
        """Prepare the rounding of the input; `set_range` has to follow."""
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


@contextmanager
def use_unsigned_inputs(network: nn.Module) -> Iterator[None]:
    """Write the codes of inputs as uint8 around 128 meanwhile, which changes no value.

    x86 processors multiply unsigned by signed bytes: VNNI's vpdpbusd takes no others.
    """
    layers = [module for module in network.modules() if isinstance(module, Int8Layer)]
    signed = [layer.zero for layer in layers]
    for layer in layers:
        layer.zero = torch.full_like(layer.zero, LARGEST + 1, dtype=torch.uint8)
    try:
        yield
    finally:
        for layer, zero in zip(layers, signed, strict=True):
            layer.zero = zero


class Int8Linear(Int8Layer):
    """The int8 form of an `nn.Linear`."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source)
        # TensorRT splits a joint product of query, key and value, and turns it to half precision in
        # doing so; three separate products it joins by itself, and they stay int8.
        parts = 3 if source.out_features == 3 * source.in_features else 1
        weights = source.weight.detach().chunk(parts)
        biases = [None] * parts if source.bias is None else source.bias.detach().chunk(parts)
        # Inputs first, as a matrix product reads them, so that no transposition is in the graph.
        pairs = zip(weights, biases, strict=True)
        self.parts = nn.ModuleList(_Weight(weight, bias, axis=1) for weight, bias in pairs)

    def outputs(self, values: Tensor) -> Tensor:  # noqa: D102
        products = []
        for part in self.parts:
            product = values @ part()
            products.append(product if part.bias is None else product + part.bias)
        return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


class Int8Convolution(Int8Layer):
    """The int8 form of an `nn.Conv2d`."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__(source)
        bias = None if source.bias is None else source.bias.detach()
        self.weight = _Weight(source.weight.detach(), bias, axis=0)
        self._geometry: Any = (source.stride, source.padding, source.dilation, source.groups)

    def outputs(self, values: Tensor) -> Tensor:  # noqa: D102
        return functional.conv2d(values, self.weight(), self.weight.bias, *self._geometry)


class _Weight(nn.Module):
    """Codes of a weight with a scale for each output, and the bias."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Float[Tensor, "outputs *inputs"], bias: Tensor | None, axis: int
    ) -> None:
        """Round the weight; `axis` is that of the outputs in the codes: 0, or 1 of a matrix."""
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
    """Return whether there is an int8 form; subclasses may compute something else."""
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.padding_mode == "zeros"  # others pad by themselves
    )


def int8_layer(layer: nn.Linear | nn.Conv2d) -> Int8Layer:
    """Return the int8 form of a float32 layer."""
    return Int8Convolution(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer)


def half_scale(scale: Float[Tensor, "*outputs"]) -> Float[Tensor, "*outputs"]:
    """Return the nearest numbers above 0 of half precision, as float32."""
    return scale.clamp(min=_SMALLEST_SCALE).half().float()


def fake_quantised(
    values: Float[Tensor, "*axes"], scale: Float[Tensor, ""]
) -> Float[Tensor, "*axes"]:
    """Return float32 values rounded to int8 codes times `scale`; a tie goes to the even code."""
    return (values / scale).round_().clamp_(-LARGEST - 1, LARGEST).mul_(scale)


def _rounded(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if not torch.onnx.is_in_onnx_export():
        return fake_quantised(values.float(), scale.float()).to(values.dtype)
    symbolic, shape = torch.onnx.ops.symbolic, values.shape
    codes = symbolic("QuantizeLinear", (values, scale, zero), dtype=zero.dtype, shape=shape)
    return symbolic("DequantizeLinear", (codes, scale, zero), dtype=scale.dtype, shape=shape)


def _dequantised(
    codes: Int8[Tensor, "*axes"], scales: Float[Tensor, " outputs"], axis: int
) -> Float[Tensor, "*axes"]:
    if torch.onnx.is_in_onnx_export():
        attributes: dict[str, Any] = {"axis": axis}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, scales), attributes, dtype=scales.dtype, shape=codes.shape
        )
    shape = [1] * codes.dim()
    shape[axis] = -1
    return (codes.float() * scales.float().view(shape)).to(scales.dtype)
