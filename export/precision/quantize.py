"""Turn a classifier's layers to int8, but for those that the logits cannot bear it in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from capt_deploy.core.errors import ConfigError, ModelError
from export.graph.visual import VisualClassifier
from export.precision.sensitivity import Candidate, find_candidates, logits_of, measure

# Of the logits' spread over images. On the photo model, whose classes are close to each other,
# 0.015 kept the class of 99 % of the images, 0.03 of 97 %, and 0.05 of 94 %.
TARGET = 0.025
_MEASURED = 32  # images, layer by layer
_CHECKED = 64  # all layers together

# TensorRT fills up what has fewer, so a depthwise convolution in int8 moves more bytes than in half
# precision; and 3 are pixels, whose rounding is most of the noise of a whole ViT.
_FEWEST_CHANNELS = 4
_NARROW = f"fewer than {_FEWEST_CHANNELS} channels a group"
_READ = "its weights are read by the sample experts"
_NOISE = "noise"


@dataclass(frozen=True)
class LayerReport:
    """What was measured of a layer."""

    noise: float  # root mean square change of the logits by this layer alone; unit as the target
    clip: float  # share of the largest input that the codes reach
    work: float  # share of all layers' multiply-adds
    left_out: str = ""  # why; empty where the layer is int8 now


@dataclass(frozen=True)
class Quantisation:
    """What was done to a network."""

    images: int  # calibrated on
    target: float  # largest root mean square change of the logits, over their spread over images
    noise: float  # what it is with all int8 layers together
    work: float  # share of the layers' multiply-adds that are int8 now
    layers: Mapping[str, LayerReport]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def quantize(
    network: VisualClassifier,
    batches: Sequence[UInt8[Tensor, "_ height width 3"]],
    target: float = TARGET,
) -> Quantisation:
    """Put int8 layers in the place of float32 ones, in place; call it before `lower`.

    Layers are left out, those first that bring in most noise for their work, until all others
    together change the logits by no more than `target`.

    Args:
        network: in float32.
        batches: preprocessed images of the kind it will see; some tens are needed.
        target: root mean square change of the logits, over their own root mean square distance
            from their means over the images.

    Raises:
        ConfigError: `target` is not positive, or there are fewer than two images.
        ModelError: the network is not float32, or has no layer that can be int8.
    """
    images = _checked(network, batches, target)
    candidates, logits = find_candidates(network.eval(), images)
    if not candidates:
        raise ModelError("int8 needs linear layers or convolutions, and the visual tower has none")
    measure(network, candidates, _some(images, _MEASURED))
    forced = _forced(network, candidates)
    free = [own for own in candidates if own.name not in forced]
    signal = float((logits - logits.mean(dim=0)).square().sum(dim=1).mean())
    checked = _some(images, _CHECKED), _some(logits, _CHECKED)
    kept, noise = _leave_out(network, free, *checked, signal, target)
    if not kept:
        raise ModelError(
            f"int8: every layer by itself changes the logits by more than the target, {target} of "
            f"their spread over the images; export --fp16 instead"
        )
    reasons = forced | {own.name: _NOISE for own in free if own not in kept}
    return _report(candidates, reasons, len(images), signal, target, noise)


def _checked(network: VisualClassifier, batches: Sequence[Tensor], target: float) -> Tensor:
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise ConfigError(f"int8 is calibrated on at least 2 images, got {count}; some tens do")
    if not target > 0:
        raise ConfigError(f"the target of int8 is a share above 0, got {target}")
    if network.dtype != torch.float32:
        raise ModelError(f"int8 starts from float32, the network is {network.dtype} already")
    return torch.cat(list(batches)).to(network.weight.device)


def _some(values: Tensor, count: int) -> Tensor:
    """Return rows spread over all of them."""
    places = torch.linspace(0, len(values) - 1, min(count, len(values)))
    return values[places.long().to(values.device)]


def _forced(network: VisualClassifier, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return the layers that are left out whatever they measure, and why."""
    read = network.layers_read()
    reasons = {}
    for own in candidates:
        if isinstance(own.layer, nn.Conv2d) and own.layer.weight.shape[1] < _FEWEST_CHANNELS:
            reasons[own.name] = _NARROW
        elif any(own.layer is layer for layer in read):
            reasons[own.name] = _READ
    return reasons


def _leave_out(
    network: VisualClassifier,
    free: Sequence[Candidate],
    images: Tensor,
    expected: Tensor,
    signal: float,
    target: float,
) -> tuple[Sequence[Candidate], float]:
    """Put int8 layers in, but for the fewest of the worst; return them and their noise.

    The measured noises add up to a guess of how many are too many; the network itself is then
    asked, by bisection.
    """
    order = sorted(free, key=lambda own: own.noise / own.work, reverse=True)
    remaining = [sum(own.noise for own in order[start:]) for start in range(len(order) + 1)]
    guess = next(start for start, sum_ in enumerate(remaining) if sum_ <= target**2 * signal)
    noises = {len(order): 0.0}
    low, high = -1, len(order)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        for place, own in enumerate(order):
            own.put(lowered=place >= guess)
        change = (logits_of(network, images) - expected).square().sum(dim=1).mean()
        noises[guess] = (float(change) / signal) ** 0.5 if signal else math.inf
        low, high = (low, guess) if noises[guess] <= target else (guess, high)
        guess = (low + high) // 2
    for place, own in enumerate(order):
        own.put(lowered=place >= high)
    return order[high:], noises[high]


def _report(
    candidates: Sequence[Candidate],
    reasons: Mapping[str, str],
    images: int,
    signal: float,
    target: float,
    noise: float,
) -> Quantisation:
    total = sum(own.work for own in candidates)
    layers = {
        own.name: LayerReport(
            noise=(own.noise / signal) ** 0.5 if signal else 0.0,
            clip=own.clip,
            work=own.work / total,
            left_out=reasons.get(own.name, ""),
        )
        for own in candidates
    }
    work = sum(layer.work for layer in layers.values() if not layer.left_out)
    return Quantisation(images, target, noise, work, layers)
