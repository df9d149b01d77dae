"""Measure how much int8 in each layer changes the logits, and choose the range of its codes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from export.graph.attention import SelfAttention
from export.precision.int8_layers import (
    LARGEST,
    can_be_int8,
    fake_quantised,
    half_scale,
    int8_layer,
)

_BATCH = 8  # images at once; bounds the memory of activations
_CLIPS = tuple(0.8**step for step in range(9))  # down to a sixth of the largest input


class Candidate:
    """A linear layer or convolution that could be int8."""

    def __init__(self, network: nn.Module, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.work = 0.0  # multiply-adds for all images
        self.largest = 0.0  # magnitude of an input
        self.clip = 1.0  # share of `largest` that the codes reach
        self.noise = 0.0  # squared change of an image's logits by this layer alone
        self.first_reader = self  # of the consecutive layers that read the same tensor
        self._places = [
            (module, attribute)
            for module in network.modules()
            for attribute, child in module._modules.items()  # named_children lists it once
            if child is layer
        ]
        self.int8 = int8_layer(layer)

    def put(self, *, int8: bool) -> None:
        """Put the layer or its int8 form into all its places in the network."""
        for module, attribute in self._places:
            setattr(module, attribute, self.int8 if int8 else self.layer)


@torch.no_grad()
def find_candidates(
    network: nn.Module, images: UInt8[Tensor, "images height width 3"]
) -> tuple[list[Candidate], Float[Tensor, "images classes"]]:
    """Return the layers that are called, with their largest inputs, and the network's logits.

    Layers that are not called have their weights read by code that would not see an int8 layer.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if can_be_int8(layer)]
    candidates = [Candidate(network, name, layer) for name, layer in layers]
    last: list[tuple[Tensor, Candidate]] = []

    def record(
        candidate: Candidate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        candidate.work += output.numel() * candidate.layer.weight[0].numel()
        candidate.largest = max(candidate.largest, float(inputs[0].abs().max()))
        if last and last[0][0] is inputs[0]:
            candidate.first_reader = last[0][1]
        else:
            last[:] = [(inputs[0], candidate)]

    with ExitStack() as stack:
        for candidate in candidates:
            hook = candidate.layer.register_forward_hook(partial(record, candidate))
            stack.callback(hook.remove)
        logits = compute_logits(network, images)
    return [candidate for candidate in candidates if candidate.work], logits


def measure(
    network: nn.Module,
    candidates: Sequence[Candidate],
    images: UInt8[Tensor, "images height width 3"],
) -> None:
    """Give each layer the range with the least noise in the logits, and record that noise (ours).

    All layers are measured in one pass over the images, one by one. For a random direction r over
    the classes, the gradient g of r·z gives the effect of a change δ of a layer's inputs: g·δ is
    r·Δz to first order, whose mean square is ‖Δz‖². Errors of the layer's own outputs would
    mislead: errors that are alike at all tokens, as of a patch convolution, add up, while those
    that the next norm removes, or at tokens that nothing reads, do no harm.
    """
    probes = [_Probe(candidate) for candidate in candidates]
    # Added to every input, so that the first layer's has a gradient too.
    zero = torch.zeros((), device=images.device, requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(written_out(network))
        for probe in probes:
            layer = probe.candidate.layer
            stack.callback(layer.register_forward_pre_hook(partial(probe.inputs, zero)).remove)
            stack.callback(layer.register_forward_hook(probe.outputs).remove)
        leaves = [zero, *(probe.gate for probe in probes)]
        for image in images.split(1):
            slopes = _slopes(network, image, leaves, draw)
            for probe, slope in zip(probes, slopes[1:], strict=True):
                probe.end_image(slope)
    for probe in probes:
        # One rounding for all readers of a tensor, so that engines join their products.
        first = probe.candidate.first_reader
        readers = [other for other in probes if other.candidate.first_reader is first]
        scattered = torch.stack([reader.scattered for reader in readers]).sum(dim=0)
        probe.choose_range(scattered, len(images))


@torch.no_grad()
def compute_logits(
    network: nn.Module, images: UInt8[Tensor, "images height width 3"]
) -> Float[Tensor, "images classes"]:
    """Return the network's logits, computed in small batches."""
    return torch.cat([network(batch)[0] for batch in images.split(_BATCH)])


def _slopes(
    network: nn.Module, image: Tensor, leaves: Sequence[Tensor], draw: torch.Generator
) -> tuple[Tensor | None, ...]:
    """Return the slopes of the logits, in a random direction, along the leaves."""
    # A separate function frees the tensors of the backward pass before the next one.
    logits = network(image)[0]
    direction = torch.randn(logits.shape, generator=draw).to(logits)
    return torch.autograd.grad((direction * logits).sum(), leaves, allow_unused=True)


class _Probe:
    """Sums up the effect of a layer's rounding on the logits, for every range."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.gate = torch.zeros((), device=candidate.layer.weight.device, requires_grad=True)
        ranges = (clip * candidate.largest for clip in _CLIPS)
        self._scales = [half_scale(torch.tensor(largest / LARGEST)) for largest in ranges]
        self.scattered = torch.zeros(len(_CLIPS), dtype=torch.float64)  # Σ(g·δ)² over elements
        self._slopes = torch.zeros(len(_CLIPS), dtype=torch.float64)  # Σg·δ of this image
        self._squares = torch.zeros(len(_CLIPS), dtype=torch.float64)  # of slopes, with weights

    def inputs(self, zero: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Request the gradient of this call's input; a forward pre-hook."""
        values = inputs[0] + zero  # a tensor that no other layer reads
        values.register_hook(partial(self._compare, inputs[0].detach()))
        return values, *inputs[1:]

    @torch.no_grad()
    def _compare(self, values: Tensor, gradient: Tensor) -> None:
        for index, scale in enumerate(self._scales):
            changes = fake_quantised(values, scale.to(values.device)).sub_(values).mul_(gradient)
            self._slopes[index] += changes.sum().cpu()
            self.scattered[index] += changes.square_().sum().cpu()

    def outputs(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the error of the rounded weights, times the gate; a forward hook."""
        with torch.no_grad():
            error = self.candidate.int8.outputs(inputs[0]) - output
        return output + self.gate * error

    def end_image(self, slope: Tensor | None) -> None:
        """Add this image's slopes; `slope` is the gate's."""
        self._squares += (self._slopes + (0 if slope is None else float(slope))) ** 2
        self._slopes.zero_()

    def choose_range(self, scattered: Float[Tensor, " clips"], images: int) -> None:
        """Choose the range by Σ(g·δ)².

        That takes the errors of the elements for independent: it is less exact than (Σg·δ)², but
        needs far fewer images.
        """
        best = int(scattered.argmin())
        self.candidate.clip = _CLIPS[best]
        self.candidate.noise = float(self._squares[best]) / images
        self.candidate.int8.set_range(self.candidate.clip * self.candidate.largest)


@contextmanager
def written_out(network: nn.Module) -> Iterator[None]:
    """Write attention out meanwhile: torch cannot differentiate ONNX's operator."""
    modules = [m for m in network.modules() if isinstance(m, SelfAttention) and m.fused]
    for module in modules:
        module.fused = False
    try:
        yield
    finally:
        for module in modules:
            module.fused = True
