"""Map the input's colours to those of natural photos, in closed form and where it gains (ours).

A camera, lamp or scanner that washes out, tints or darkens colours shifts all images alike. No
prompt can undo that, and adapters deep in the tower only partly; twelve numbers in front of it can.
They cost nothing at inference, because they fold into the patch convolution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from capt_deploy.data.preprocess import PreprocessConfig
from capt_train.calibrate.temperature import calibrated_losses
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap

# Mean of RGB in [0, 1] over the photos of CLIP (openai/CLIP, clip.py), and eigenvalues and
# eigenvectors of the covariance over those of ImageNet (facebookarchive/fb.resnet.torch,
# datasets/imagenet.lua, for the lighting of Krizhevsky et al. 2012).
_MEAN = (0.4814, 0.4578, 0.4082)
_VARIANCES = (0.2175, 0.0188, 0.0045)
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

_SMALLEST_VARIANCE = 1 / 255**2  # grey images have no colours to bring back
_FIRST = 64  # images that can rule the map out
_FEWEST = 8  # images that can decide; fewer have no meaningful standard error
_STANDARD_ERRORS = 2.0  # by which the gain must exceed 0
# In nats; simulated cameras gain 0.3 to 0.6 on cifar100. A map embeds all images again.
_LEAST_GAIN = 0.05


@dataclass(frozen=True)
class ColourFit:
    """The colour map, if it gains, and its gain."""

    colours: ColourMap | None  # None: no gain, images stay unchanged
    gain: float  # in calibrated NLL of the hand-written prompt on training images
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


def natural_colours(
    pixels: UInt8[Tensor, "images height width 3"], preprocess: PreprocessConfig
) -> ColourMap:
    """Return the map that gives the pixels the mean and covariance of natural photos.

    Of all affine maps that do, it is the one that moves colours least, the Monge-Kantorovich map
    `A = T^½·(T^½·S·T^½)^−½·T^½` from covariance S to T (Pitié and Kokaram 2007, "The linear
    Monge-Kantorovitch linear colour mapping for example-based colour transfer").

    Args:
        pixels: preprocessed images, RGB 0-255.
        preprocess: gives the normalisation, because the map acts on normalised pixels.
    """
    rgb = pixels.reshape(-1, 3).double() / 255
    floor = _SMALLEST_VARIANCE * torch.eye(3, dtype=torch.float64)
    axes, mean = rgb.new_tensor(_AXES), rgb.new_tensor(_MEAN)
    root = _power(axes @ rgb.new_tensor(_VARIANCES).diag() @ axes.T, 0.5)
    matrix = root @ _power(root @ (torch.cov(rgb.T) + floor) @ root, -0.5) @ root
    offset = mean - matrix @ rgb.mean(dim=0)
    # x = σ·n + μ, for normalised pixels n
    centre, deviation = rgb.new_tensor(preprocess.mean), rgb.new_tensor(preprocess.std)
    return ColourMap(
        (matrix * deviation / deviation[:, None]).float(),
        ((matrix @ centre + offset - centre) / deviation).float(),
    )


def fit_colours(
    backbone: Backbone,
    reference: Float[Tensor, "classes dim"],
    pixels: UInt8[Tensor, "images height width 3"],
    labels: Int[Tensor, " images"],
    embeddings: Float[Tensor, "images dim"],
) -> ColourFit:
    """Return the map to natural colours, if it helps the hand-written prompt.

    It is kept where it lowers the calibrated NLL by more than two standard errors of the
    difference, image by image, and by 0.05 nats. Images and labels may be those that are tuned on:
    the map knows no labels. Where the first images gain less than one standard error, no others
    are embedded.

    Args:
        backbone: the frozen model, without a map.
        reference: hand-written t⁰ of the tuned classes.
        pixels: preprocessed images in random order, RGB 0-255; fewer than eight keep no map.
        labels: their classes, as positions in `reference`.
        embeddings: the images by the frozen model.
    """
    count = len(labels)
    if count < _FEWEST:
        return ColourFit(None, 0.0, 0.0)
    colours = natural_colours(pixels, backbone.preprocess)
    mapped, texts, after = backbone.recoloured(colours), reference.cpu(), embeddings[:0]
    gain = error = 0.0
    for end in sorted({min(_FIRST, count), count}):
        fresh = [mapped.image_embeddings(part) for part in pixels[len(after) : end].split(_FIRST)]
        after = torch.cat([after, *(part.cpu() for part in fresh)])
        losses, mapped_losses = (
            calibrated_losses(backbone.scale * rows @ texts.T, labels[:end])
            for rows in (embeddings[:end], after)
        )
        gains = losses - mapped_losses
        gain, error = float(gains.mean()), float(gains.std()) / end**0.5
        if not gain > error:
            break
    kept = gain > max(_STANDARD_ERRORS * error, _LEAST_GAIN)
    return ColourFit(colours if kept else None, gain, error)


def _power(matrix: Float[Tensor, "3 3"], exponent: float) -> Float[Tensor, "3 3"]:
    """Return a power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    power: Tensor = vectors @ (values**exponent).diag() @ vectors.T
    return power
