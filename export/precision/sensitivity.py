"""How wide a range the int8 codes of a layer should span, and how much noise it then brings in."""

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

_BATCH = 8  # images at once; bounds what activations take
_CLIPS = tuple(0.8**step for step in range(9))  # down to a sixth of the largest input


class Candidate:
    """A linear layer or convolution that could be int8."""

    def __init__(self, network: nn.Module, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.work = 0.0  # multiply-adds for all images it was run on
        self.largest = 0.0  # magnitude of an input
        self.clip = 1.0  # share of it that the codes reach
        self.noise = 0.0  # squared change of an image's logits by this layer alone
        self.first = self  # of those in a row that read the same tensor
        self._places = [
            (owner, own)
            for owner in network.modules()
            for own, child in owner._modules.items()  # named_children lists it once
            if child is layer
        ]
        self.int8 = int8_layer(layer)

    def put(self, lowered: bool) -> None:
        """Put the layer or its int8 form into all its places."""
        for owner, own in self._places:
            setattr(owner, own, self.int8 if lowered else self.layer)


@torch.no_grad()
def find_candidates(
    network: nn.Module, images: UInt8[Tensor, "images height width 3"]
) -> tuple[list[Candidate], Float[Tensor, "images classes"]]:
    """Return the layers that are called, with their largest inputs, and the network's logits.

    Others' weights are read by code that would not see another layer in their place.
    """
    layers = [(name, own) for name, own in network.named_modules() if can_be_int8(own)]
    candidates = [Candidate(network, *own) for own in layers]
    last: list[tuple[Tensor, Candidate]] = []

    def see(own: Candidate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own.work += output.numel() * own.layer.weight[0].numel()
        own.largest = max(own.largest, float(inputs[0].abs().max()))
        if last and last[0][0] is inputs[0]:
            own.first = last[0][1]
        else:
            last[:] = [(inputs[0], own)]

    with ExitStack() as stack:
        for own in candidates:
            stack.callback(own.layer.register_forward_hook(partial(see, own)).remove)
        logits = logits_of(network, images)
    return [own for own in candidates if own.work], logits


def measure(
    network: nn.Module,
    candidates: Sequence[Candidate],
    images: UInt8[Tensor, "images height width 3"],
) -> None:
    """Give each layer the range that the logits bear best, and the noise that is left (ours).

    All layers are measured in one pass over the images, one by one. For a random direction r over
    the classes, the gradient g of r·z says what a change δ of a layer's inputs does: g·δ is r·Δz
    to first order, whose mean square is ‖Δz‖². The errors of the layer's own outputs would not do:
    those that are alike at all tokens, as of a patch convolution, add up, and those that the next
    norm removes, or at tokens that nobody reads, do no harm.
    """
    probes = [_Probe(own) for own in candidates]
    # Added to every input, so that also the first layer's has a gradient.
    zero = torch.zeros((), device=images.device, requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_differentiable(network))
        for probe in probes:
            layer = probe.own.layer
            stack.callback(layer.register_forward_pre_hook(partial(probe.inputs, zero)).remove)
            stack.callback(layer.register_forward_hook(probe.outputs).remove)
        leaves = [zero, *(probe.gate for probe in probes)]
        for image in images.split(1):
            slopes = _slopes(network, image, leaves, draw)
            for probe, slope in zip(probes, slopes[1:], strict=True):
                probe.add(slope)
    for probe in probes:
        # One rounding for all that read the same tensor, so that engines join their products.
        readers = [other for other in probes if other.own.first is probe.own.first]
        probe.close(torch.stack([own.scattered for own in readers]).sum(dim=0), len(images))


@torch.no_grad()
def logits_of(
    network: nn.Module, images: UInt8[Tensor, "images height width 3"]
) -> Float[Tensor, "images classes"]:
    """Return the network's logits, computed in small batches."""
    return torch.cat([network(batch)[0] for batch in images.split(_BATCH)])


def _slopes(
    network: nn.Module, image: Tensor, leaves: Sequence[Tensor], draw: torch.Generator
) -> tuple[Tensor | None, ...]:
    """Return the slopes of the logits, in a random direction, along the leaves."""
    # A function of its own: what the backward pass kept must be gone before the next image.
    logits = network(image)[0]
    direction = torch.randn(logits.shape, generator=draw).to(logits)
    return torch.autograd.grad((direction * logits).sum(), leaves, allow_unused=True)


class _Probe:
    """Sums up what the rounding of one layer does to the logits, for every range."""

    def __init__(self, own: Candidate) -> None:
        self.own = own
        self.gate = torch.zeros((), device=own.layer.weight.device, requires_grad=True)
        self._scales = [half_scale(torch.tensor(clip * own.largest / LARGEST)) for clip in _CLIPS]
        self.scattered = torch.zeros(len(_CLIPS), dtype=torch.float64)  # Σ(g·δ)² over elements
        self._slopes = torch.zeros(len(_CLIPS), dtype=torch.float64)  # Σg·δ of this image
        self._squares = torch.zeros(len(_CLIPS), dtype=torch.float64)  # of those and the weights'

    def inputs(self, zero: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Ask for the gradient of what this call reads; a forward pre-hook."""
        own = inputs[0] + zero  # others that read the same tensor are not in its gradient
        own.register_hook(partial(self._compare, inputs[0].detach()))
        return own, *inputs[1:]

    @torch.no_grad()
    def _compare(self, values: Tensor, gradient: Tensor) -> None:
        for index, scale in enumerate(self._scales):
            changes = fake_quantised(values, scale.to(values.device)).sub_(values).mul_(gradient)
            self._slopes[index] += changes.sum().cpu()
            self.scattered[index] += changes.square_().sum().cpu()

    def outputs(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Let the rounded weights' error in through the gate; a forward hook."""
        with torch.no_grad():
            error = self.own.int8.outputs(inputs[0]) - output
        return output + self.gate * error

    def add(self, slope: Tensor | None) -> None:
        """End an image; `slope` is the gate's."""
        self._squares += (self._slopes + (0 if slope is None else float(slope))) ** 2
        self._slopes.zero_()

    def close(self, scattered: Float[Tensor, " clips"], images: int) -> None:
        """Choose the range.

        Σ(g·δ)² takes the errors of the elements for independent: it is less exact than (Σg·δ)²,
        but known from far fewer images.
        """
        best = int(scattered.argmin())
        self.own.clip, self.own.noise = _CLIPS[best], float(self._squares[best]) / images
        self.own.int8.set_range(self.own.clip * self.own.largest)


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Write attention out: torch cannot differentiate ONNX's operator for it."""
    attentions = [own for own in network.modules() if isinstance(own, SelfAttention) and own.fused]
    for own in attentions:
        own.fused = False
    try:
        yield
    finally:
        for own in attentions:
            own.fused = True
