import numpy as np
import pytest
import torch
from torch import nn

from export.graph.lower import lower
from export.precision.int8_layers import can_be_int8, fake_quantised, half_scale, int8_layer

LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "linear over tokens, no bias": (lambda: nn.Linear(12, 7, bias=False), (2, 3, 12)),
    "query, key and value": (lambda: nn.Linear(12, 36), (2, 3, 12)),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, dilation=2, bias=False), (1, 8, 9, 9)),
}


def seeded(make, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False), 2 * torch.randn(shape)


def by_integers(layer, values, largest):
    """Compute the layer in whole numbers: int8 times int8, scaled once at the end."""
    weight = layer.weight.numpy().astype(np.float64)
    axes = tuple(range(1, weight.ndim))
    scales = np.float16(np.abs(weight).max(axis=axes) / 127).astype(np.float64)
    outputs = scales.reshape(-1, *[1] * (weight.ndim - 1))
    codes = torch.from_numpy(np.rint(weight / outputs))
    step = np.float64(np.float16(largest / 127))
    # rint: ties to even, as QuantizeLinear is defined
    read = torch.from_numpy(np.rint(values.numpy() / step).clip(-128, 127))
    if isinstance(layer, nn.Linear):
        product, scale = read @ codes.T, torch.from_numpy(scales)
    else:
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        product = nn.functional.conv2d(read, codes, None, *geometry)
        scale = torch.from_numpy(scales)[:, None, None]
    assert torch.equal(product, product.round()) and product.abs().max() > 1000
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (scale.dim() - 1))
    return (product * step * scale + bias).float()


@pytest.mark.parametrize("kind", LAYERS)
def test_it_computes_what_integer_arithmetic_computes(kind):
    layer, values = seeded(*LAYERS[kind])
    own = int8_layer(layer)
    own.set_range(2.5)
    assert values.abs().max() > 2.5  # some are clipped
    torch.testing.assert_close(own(values), by_integers(layer, values, 2.5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own(values), layer(values), atol=1e-3)
    own.set_range(float(values.abs().max()))
    error = (own(values) - layer(values)).square().mean() / layer(values).square().mean()
    assert error < 1e-3


def test_rounding_takes_ties_to_even_and_clips():
    values = torch.tensor([0.25, 0.75, 1.25, -0.75, 63.4, 63.6, 900.0, -63.9, -64.1, -900.0])
    expected = torch.tensor([0.0, 1.0, 1.0, -1.0, 63.5, 63.5, 63.5, -64.0, -64.0, -64.0])
    assert torch.equal(fake_quantised(values, torch.tensor(0.5)), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_bytes_and_lowering_leaves_codes_and_scales_as_they_are(kind):
    layer, values = seeded(*LAYERS[kind])
    own = int8_layer(layer)
    own.set_range(float(values.abs().max()))
    before = {name: buffer.clone() for name, buffer in own.named_buffers()}
    codes = [buffer for name, buffer in before.items() if name.endswith("codes")]
    assert sum(code.numel() for code in codes) == layer.weight.numel()
    assert {code.dtype for code in codes} == {torch.int8}
    wide = own(values)
    lower(own, torch.float16)
    for name, buffer in own.named_buffers():
        floating = before[name].is_floating_point()
        assert buffer.dtype == (torch.float16 if floating else torch.int8)
        if not name.endswith("bias"):
            assert torch.equal(buffer.float(), before[name].float())
    # Half an input's step may fall to either side once inputs are rounded to half precision.
    assert (own(values.half()).float() - wide).abs().mean() < 0.01 * wide.abs().mean()


def test_scales_never_become_zero():
    layer = nn.Linear(6, 4).requires_grad_(False)
    layer.weight[0] = 0.0
    layer.weight[1] = 1e-9
    layer.weight[2] *= 1e-5
    own = int8_layer(layer)
    own.set_range(0.0)
    lower(own, torch.float16)
    values = torch.linspace(-2, 2, 6).half()[None]
    assert all((buffer > 0).all() for name, buffer in own.named_buffers() if "scale" in name)
    assert own(values).isfinite().all()
    own = int8_layer(layer)
    own.set_range(2.0)
    difference = (own(values.float()) - layer(values.float())).abs()[0]
    assert (difference[:3] < 1e-6).all()  # next to nothing was there, next to nothing is lost


def test_a_scale_is_the_nearest_number_of_half_precision():
    scales = torch.tensor([0.1, 1 / 3, 1e-5, 3e-9, 0.0])
    expected = np.float16([0.1, 1 / 3, 1e-5, 2**-24, 2**-24]).astype(np.float32)
    assert torch.equal(half_scale(scales), torch.from_numpy(expected))


def test_only_what_is_understood_has_an_int8_form():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    assert can_be_int8(nn.Linear(3, 3)) and can_be_int8(nn.Conv2d(4, 4, 1, padding="same"))
    for layer in (
        Own(3, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(3, 3, 1),
        nn.LayerNorm(3),
    ):
        assert not can_be_int8(layer)
