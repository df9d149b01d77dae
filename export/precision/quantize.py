"""Put int8 layers into a classifier, except where they would change the logits too much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from capt_deploy.core.errors import ConfigError, ModelError
from export.graph.visual import VisualClassifier
from export.precision.sensitivity import Candidate, compute_logits, find_candidates, measure

# Share of the logits' spread over images. On the photo model, whose classes are close to each
# other, 0.015 kept the class of 99 % of the images, 0.03 of 97 %, and 0.05 of 94 %.
TARGET = 0.025
_MEASURED = 32  # images on which layers are measured one by one
_CHECKED = 64  # images on which all int8 layers are checked together

# TensorRT pads narrower inputs, so a depthwise convolution in int8 moves more bytes than in half
# precision; and 3 channels are pixels, whose rounding is most of the noise of a whole ViT.
_FEWEST_CHANNELS = 4
_NARROW = f"fewer than {_FEWEST_CHANNELS} channels a group"
_READ = "its weights are read by the sample experts"
_NOISE = "noise"


@dataclass(frozen=True)
class LayerReport:
    """Measurements of a layer."""

    noise: float  # root mean square change of the logits by this layer alone; unit as the target
    clip: float  # share of the largest input that the codes reach
    work: float  # share of all layers' multiply-adds
    left_out: str = ""  # why; empty if the layer is int8


@dataclass(frozen=True)
class Quantisation:
    """Measurements of a quantised network."""

    images: int  # used for calibration
    target: float  # largest root mean square change of the logits, over their spread over images
    noise: float  # change with all int8 layers together
    work: float  # share of the layers' multiply-adds in int8
    layers: Mapping[str, LayerReport]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def quantize(
    network: VisualClassifier,
    images: UInt8[Tensor, "images height width 3"],
    target: float = TARGET,
) -> Quantisation:
    """Put int8 layers in the place of float32 ones, in place; call it before `lower`.

    Layers with the most noise for their work are left out, until all others together change the
    logits by no more than `target`.

    Args:
        network: in float32.
        images: preprocessed training images; some tens are needed.
        target: root mean square change of the logits, over their root mean square distance from
            their means over the images.

    Raises:
        ConfigError: there are fewer than two images.
        ModelError: the network has no layer that can be int8.
    """
    if len(images) < 2:
        raise ConfigError(f"int8 calibration: expected some tens of images, came {len(images)}")
    images = images.to(network.weight.device)
    candidates, logits = find_candidates(network.eval(), images)
    if not candidates:
        raise ModelError("int8 needs linear layers or convolutions, and the visual tower has none")
    measure(network, candidates, _some(images, _MEASURED))
    left_out = _unsuitable(network, candidates)
    suitable = [candidate for candidate in candidates if candidate.name not in left_out]
    signal = float((logits - logits.mean(dim=0)).square().sum(dim=1).mean())
    checked = _some(images, _CHECKED), _some(logits, _CHECKED)
    kept, noise = _leave_out(network, suitable, *checked, signal, target)
    if not kept:
        raise ModelError(
            f"int8: every layer by itself changes the logits by more than the target, {target} of "
            f"their spread over the images; export --fp16 instead"
        )
    left_out |= {layer.name: _NOISE for layer in suitable if layer not in kept}
    total = sum(candidate.work for candidate in candidates)
    layers = {
        candidate.name: LayerReport(
            noise=(candidate.noise / signal) ** 0.5 if signal else 0.0,
            clip=candidate.clip,
            work=candidate.work / total,
            left_out=left_out.get(candidate.name, ""),
        )
        for candidate in candidates
    }
    work = sum(layer.work for layer in layers.values() if not layer.left_out)
    return Quantisation(len(images), target, noise, work, layers)


def _some(values: Tensor, count: int) -> Tensor:
    """Return `count` rows, spread evenly."""
    places = torch.linspace(0, len(values) - 1, min(count, len(values)))
    return values[places.long().to(values.device)]


def _unsuitable(network: VisualClassifier, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return the layers that must not be int8 even if their noise is low, and why."""
    read = network.layers_read()
    reasons = {}
    for candidate in candidates:
        layer = candidate.layer
        if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] < _FEWEST_CHANNELS:
            reasons[candidate.name] = _NARROW
        elif any(layer is other for other in read):
            reasons[candidate.name] = _READ
    return reasons


def _leave_out(
    network: VisualClassifier,
    suitable: Sequence[Candidate],
    images: UInt8[Tensor, "images height width 3"],
    expected: Float[Tensor, "images classes"],
    signal: float,
    target: float,
) -> tuple[Sequence[Candidate], float]:
    """Put int8 layers in, except for the fewest of the worst; return them and their noise.

    The sum of the measured noises gives a first guess of that number, and a bisection with the
    network itself the exact one.
    """
    order = sorted(suitable, key=lambda layer: layer.noise / layer.work, reverse=True)
    remaining = [sum(layer.noise for layer in order[start:]) for start in range(len(order) + 1)]
    guess = next(start for start, sum_ in enumerate(remaining) if sum_ <= target**2 * signal)
    noises = {len(order): 0.0}
    low, high = -1, len(order)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        for place, layer in enumerate(order):
            layer.put(int8=place >= guess)
        change = (compute_logits(network, images) - expected).square().sum(dim=1).mean()
        noises[guess] = (float(change) / signal) ** 0.5 if signal else math.inf
        low, high = (low, guess) if noises[guess] <= target else (guess, high)
        guess = (low + high) // 2
    for place, layer in enumerate(order):
        layer.put(int8=place >= high)
    return order[high:], noises[high]
