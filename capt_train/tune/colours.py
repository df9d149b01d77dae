"""Fit an affine map of the input's colours, before anything else is tuned (ours).

A camera, lamp or scanner that washes out, tints or darkens colours shifts all images alike. No
prompt can undo that, and adapters deep in the tower only partly; twelve numbers in front of it can.
They cost nothing at inference, because they fold into the patch convolution.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.core.console import progress
from capt_train.calibrate.temperature import calibrated_losses
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.tune.epochs import learning_rate

_ROUNDS = 4  # the steps are divided into rounds; after each, the deciding images are measured
_BATCH = 64
_EMBEDDED_AT_ONCE = 256
_TUNED_AT_ONCE = 16  # images through the whole tower and back; more would fill a GPU
_STANDARD_ERRORS = 2.0  # the gain must exceed 0 by this many


@dataclass(frozen=True)
class Labelled:
    """Preprocessed images with their labels as positions among the tuned classes."""

    pixels: UInt8[Tensor, "images height width 3"]
    labels: Int[Tensor, " images"]


@dataclass(frozen=True)
class ColourFit:
    """The fitted map, if it gains, and its gain."""

    colours: ColourMap | None  # None: no gain, images stay unchanged
    gain: float  # of the best map, in calibrated NLL on the deciding images
    standard_error: float  # of the gain

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        colours = None if self.colours is None else self.colours.to_dict()
        return {"colours": colours, "gain": self.gain, "standard_error": self.standard_error}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ColourFit":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        record = values["colours"]
        colours = None if record is None else ColourMap.from_dict(record)
        figures = float(values["gain"]), float(values["standard_error"])
        if not all(map(math.isfinite, figures)):
            raise ValueError("expected finite numbers")
        return cls(colours, *figures)


class _Trained(nn.Module):
    """The map during fitting, as the exponential of a matrix that starts as the identity.

    So it stays invertible, and dividing saturation by five is as far away as multiplying it.
    Brightness and saturation, which cameras change most, have a parameter each besides the matrix,
    so that their steps are larger.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(3, 3))
        self.log_gains = nn.Parameter(torch.zeros(2))
        self.offset = nn.Parameter(torch.zeros(3))
        self.grey: Tensor
        self.register_buffer("grey", torch.full((3, 3), 1 / 3))

    def forward(self) -> ColourMap:
        colour = torch.eye(3, device=self.grey.device) - self.grey
        log = self.log + self.log_gains[0] * self.grey + self.log_gains[1] * colour
        return ColourMap(torch.matrix_exp(log), self.offset)


def fit_colours(
    backbone: Backbone,
    reference: Float[Tensor, "classes dim"],
    train: Labelled,
    deciding: Labelled,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> ColourFit:
    """Fit the map by cross-entropy with the hand-written prompt; keep it if other images gain.

    The map is kept where it lowers the calibrated NLL of `deciding` by more than two standard
    errors of the difference, image by image. Fitting stops half-way where there is no gain at all.
    New classes need no say: twelve numbers cannot overfit to single classes.

    Args:
        backbone: the frozen model, without a map.
        reference: hand-written t⁰ of the tuned classes.
        train: images to fit on.
        deciding: other images; with fewer than two, no map is kept.
        steps: number of steps of Adam, at least 4.
        rate: peak learning rate.
        seed: seed of the order of images and of mirroring.
    """
    best = none = ColourFit(None, 0.0, 0.0)
    if len(deciding.labels) < 2:  # one image has no standard error
        return none
    trained = _Trained().to(backbone.device)
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    before = _losses(backbone, reference, deciding)
    ends = [steps * (turn + 1) // _ROUNDS for turn in range(_ROUNDS)]
    with progress("fitting the colours", steps, "steps") as counter:
        for step, (pixels, labels) in enumerate(_minibatches(train, steps, seed)):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 0, rate)
            optimizer.zero_grad()
            for part, targets in zip(
                pixels.split(_TUNED_AT_ONCE), labels.split(_TUNED_AT_ONCE), strict=True
            ):
                logits = _logits(backbone.recoloured(trained()), reference, part)
                total = functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
                (total / len(labels)).backward()
            optimizer.step()
            counter.advance(1)
            if step + 1 in ends:
                colours = trained().detached()
                gains = before - _losses(backbone.recoloured(colours), reference, deciding)
                gain = float(gains.mean())  # NaN is no gain
                if gain > best.gain:
                    best = ColourFit(colours, gain, float(gains.std()) / len(gains) ** 0.5)
                elif best is none and 2 * (step + 1) >= steps:
                    break
    sure = best.gain > _STANDARD_ERRORS * best.standard_error
    return best if sure else replace(best, colours=None)


def _minibatches(images: Labelled, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random minibatches, half of the images mirrored; every image once before any twice."""
    draw = torch.Generator().manual_seed(seed)
    count, order = len(images.labels), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(_BATCH, count):
            order = torch.cat([order, torch.randperm(count, generator=draw)])
        rows, order = order[:_BATCH], order[_BATCH:]
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=draw) < 0.5
        pixels = images.pixels[rows]
        yield torch.where(mirrored, pixels.flip(2), pixels), images.labels[rows]


def _logits(
    backbone: Backbone, reference: Tensor, pixels: Tensor
) -> Float[Tensor, "images classes"]:
    features = backbone.model.encode_image(backbone.normalise(pixels))
    return backbone.scale * functional.normalize(features, dim=-1) @ reference.T


@torch.no_grad()
def _losses(backbone: Backbone, reference: Tensor, images: Labelled) -> Float[Tensor, " images"]:
    """Return each image's NLL at the best temperature for all of them."""
    parts = images.pixels.split(_EMBEDDED_AT_ONCE)
    logits = torch.cat([_logits(backbone, reference, part) for part in parts])
    return calibrated_losses(logits, images.labels.to(logits.device)).cpu()
