"""An affine map of the input's colours, fitted before anything else is tuned (ours).

A camera, a lamp or a scanner that washes colours out, tints or darkens them moves every image the
same way. No prompt can undo that, and adapters deep in the tower only in part; twelve numbers in
front of it can. They cost nothing at inference, for they fold into the patch convolution.
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
from capt_train.tune.schedule import learning_rate

_ROUNDS = 4  # of steps, each followed by a look at the images that decide
_BATCH = 64
_EMBEDDED_AT_ONCE = 256
_TUNED_AT_ONCE = 16  # through the whole tower and back: more would fill a GPU's memory
_STANDARD_ERRORS = 2.0  # by which the map must be better than none


@dataclass(frozen=True)
class Labelled:
    """Preprocessed images, and their classes as positions among those that are tuned."""

    pixels: UInt8[Tensor, "images height width 3"]
    labels: Int[Tensor, " images"]


@dataclass(frozen=True)
class ColourFit:
    """What was found, and whether it is worth having."""

    colours: ColourMap | None  # None: the images stay as they are
    gain: float  # in calibrated NLL, on the images that decide; of the best map seen
    standard_error: float  # of that gain

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        own = None if self.colours is None else self.colours.to_dict()
        return {"colours": own, "gain": self.gain, "standard_error": self.standard_error}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ColourFit":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        own = None if values["colours"] is None else ColourMap.from_dict(values["colours"])
        figures = float(values["gain"]), float(values["standard_error"])
        if not all(map(math.isfinite, figures)):
            raise ValueError("expected finite numbers")
        return cls(own, *figures)


class _Trained(nn.Module):
    """The map while it is fitted, as the exponential of a matrix; starts as the identity.

    So it stays invertible, and a camera that divides saturation by five is as near as one that
    multiplies it. Brightness and saturation, which cameras change most, have a number each besides
    their share in the matrix, so that their steps are larger.
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

    It is kept where its calibrated NLL on `deciding` is lower than without it by two standard
    errors of that difference, image by image. If it is not lower at all after half of the steps,
    the rest is not tried. Classes that are not tuned on are not asked: a map of twelve numbers
    has no room for single classes.

    Args:
        backbone: frozen, without a map.
        reference: hand-written t⁰ of the tuned classes.
        train: images to fit on.
        deciding: other images; with fewer than two of them nothing is kept.
        steps: of Adam, at least 4.
        rate: peak learning rate.
        seed: of the order of images, and of which are mirrored.
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
            for part, own in zip(
                pixels.split(_TUNED_AT_ONCE), labels.split(_TUNED_AT_ONCE), strict=True
            ):
                logits = _logits(backbone.recoloured(trained()), reference, part)
                total = functional.cross_entropy(logits, own.to(logits.device), reduction="sum")
                (total / len(labels)).backward()
            optimizer.step()
            counter.advance(1)
            if step + 1 in ends:
                found = trained().detached()
                gains = before - _losses(backbone.recoloured(found), reference, deciding)
                gain = float(gains.mean())  # NaN is no gain
                if gain > best.gain:
                    best = ColourFit(found, gain, float(gains.std()) / len(gains) ** 0.5)
                elif best is none and 2 * (step + 1) >= steps:
                    break
    sure = best.gain > _STANDARD_ERRORS * best.standard_error
    return best if sure else replace(best, colours=None)


def _minibatches(images: Labelled, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random images, half of them mirrored, with their labels; each once before any twice."""
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
    """Return each image's NLL at the temperature that calibration would fit to all of them."""
    parts = images.pixels.split(_EMBEDDED_AT_ONCE)
    logits = torch.cat([_logits(backbone, reference, part) for part in parts])
    return calibrated_losses(logits, images.labels.to(logits.device)).cpu()
