"""The exported network: pixels in, calibrated probabilities out, without a text tower."""

import copy
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.confidence.calibration import (
    LEAD,
    NEGLIGIBLE,
    UNCALIBRATED,
    Calibration,
    TopLabelMap,
)
from capt_deploy.core.errors import ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.open_tower import open_tower
from capt_train.method.visual_tuner import VisualTuner
from export.graph.attention import simplify_attention
from export.graph.convolutions import simplified_convolutions
from export.graph.lower import lower
from export.source.fold import FoldedHead

_PIXEL_UNIT = 256.0  # in half precision pixels are counted in these


class VisualClassifier(nn.Module):
    """The visual tower and folded head of a tuned model."""

    matrix: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    factors: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        head: FoldedHead,
        tuner: VisualTuner | None = None,
        *,
        calibration: Calibration = UNCALIBRATED,
        fused_attention: bool = False,
    ) -> None:
        """Copy the visual tower; fold normalisation and colour map into its first convolution.

        `tuner` goes into the graph with its constant α and κ, or into the weights where it only
        updates these. Where the first convolution pads its input (CLIP's ResNets), folding would
        not be exact, for a padded zero means the mean colour there; such towers get an explicit
        normalisation.

        Args:
            backbone: the model with the tower.
            head: the folded text side.
            tuner: parts that were trained inside the tower.
            calibration: whose factors and top-label map go into the graph; `head` has the rest.
            fused_attention: write ONNX's Attention operator, which needs opset 23 and, for
                TensorRT, half precision.
        """
        super().__init__()
        copied = copy.deepcopy(backbone.model.visual)
        self.tuner = None if tuner is None else tuner.folded().merge(copied)
        self.visual: Any = simplified_convolutions(copied, backbone.preprocess.size)
        simplify_attention(self.visual, fused_attention)
        self._tower = None
        if self.tuner is not None:
            self._tower = open_tower(self.visual, backbone.preprocess.size)
            if self._tower is None:
                raise ModelError("the visual tower cannot be opened to put its tuning in")
        self.dtype = torch.float32
        matrix, offset = _normalisation(backbone)
        self.normalises = not _fold_normalisation(self.visual, matrix, offset)
        self.register_buffer("matrix", matrix.float().view(3, 3, 1, 1))
        self.register_buffer("offset", offset.float())
        self.register_buffer("weight", head.weight.float()[:, :, None, None])
        self.register_buffer("bias", head.bias.float())
        factors, top_label = calibration.factors, calibration.top_label
        self.register_buffer("factors", None if factors is None else torch.tensor(factors)[:, None])
        self.top_label = None if top_label is None else _TopLabel(top_label, len(head.weight))

    def layers_read(self) -> tuple[nn.Module, ...]:
        """Return the tower's layers whose weights its tuning reads, so that they must stay."""
        if self.tuner is None or self._tower is None:
            return ()
        return self.tuner.layers_read(self._tower)

    def lower(self, dtype: torch.dtype) -> None:
        """Change the network to `dtype`, in place; norms, embedding and head stay float32."""
        if dtype == torch.float32:
            return
        # Weights of 0-255 pixels are too small for half precision; a power of two is exact.
        patches = _patch_convolution(self.visual)
        weight = self.matrix if self.normalises or patches is None else patches.weight
        weight.data *= _PIXEL_UNIT
        for part in (self.visual, self.tuner):
            if part is not None:
                lower(part, dtype)
        self.matrix, self.offset = self.matrix.to(dtype), self.offset.to(dtype)
        self.dtype = dtype

    def forward(
        self, images: UInt8[Tensor, "batch height width 3"]
    ) -> tuple[
        Float[Tensor, "batch classes"], Float[Tensor, "batch classes"], Float[Tensor, "batch dim"]
    ]:
        """Return calibrated logits, probabilities, and unit-norm embeddings, all float32.

        The map of the top label is in the probabilities alone: logits of images between two classes
        would jump with the class that leads.
        """
        # TensorRT allows a uint8 input to feed a cast only. 0-255 are exact in every float.
        pixels = images.to(self.dtype).permute(0, 3, 1, 2)
        if self.dtype != torch.float32:
            pixels = pixels * (1 / _PIXEL_UNIT)
        if self.normalises:
            pixels = functional.conv2d(pixels, self.matrix, self.offset)
        if self.tuner is not None and self._tower is not None:
            tokens = self.tuner.prefix(self._tower, pixels)
            embedding = self.tuner(self._tower, tokens).embeddings
        else:
            features = self.visual(pixels)
            if isinstance(features, tuple):  # CoCa's tower returns its tokens too
                features = features[0]
            embedding = functional.normalize(features.float(), dim=-1)
        # A convolution of one pixel: Turing has no float32 matrix products.
        logits = functional.conv2d(embedding[:, :, None, None], self.weight, self.bias)
        logits = logits.flatten(1)
        if self.factors is not None:
            logits = logits * functional.embedding(logits.argmax(dim=1), self.factors)
        shown = logits if self.top_label is None else self.top_label(logits)
        return logits, shown.softmax(dim=-1), embedding


class _TopLabel(nn.Module):
    """The method `TopLabelMap.shift` as operators that every runtime has."""

    starts: Tensor
    widths: Tensor
    rises: Tensor
    places: Tensor

    def __init__(self, top_label: TopLabelMap, classes: int) -> None:
        super().__init__()
        self._map = top_label
        knots, values = (
            torch.tensor([row], dtype=torch.float64)
            for row in (top_label.positions, top_label.values)
        )
        self.register_buffer("starts", knots[:, :-1].float())
        self.register_buffer("widths", knots.diff(dim=1).float())
        self.register_buffer("rises", values.diff(dim=1).float())
        self.register_buffer("places", torch.arange(classes)[None])

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        leads = self.places == logits.argmax(dim=1, keepdim=True)
        others = logits.masked_fill(leads, NEGLIGIBLE)
        top, second = logits.amax(dim=1, keepdim=True), others.amax(dim=1, keepdim=True)
        rest = second + (others - second).exp().sum(dim=1, keepdim=True).log()
        shift = torch.maximum(self._mapped(top - rest) + rest, second + LEAD) - top
        return logits + shift * leads.to(logits.dtype)

    def _mapped(self, odds: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch 1"]:
        first, last = self._map.positions[0], self._map.positions[-1]
        above = self._map.above * (odds - last).relu()
        mapped = self._map.values[0] + above - self._map.below * (first - odds).relu()
        if first == last:
            return mapped
        # Shares of each segment, for a sum of changes of slope would cancel out large numbers.
        shares = ((odds - self.starts) / self.widths).clamp(0, 1)
        return mapped + (shares * self.rises).sum(dim=1, keepdim=True)


def _normalisation(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Return M and o of the tower's input `M·x + o` for 0-255 pixels x, in float64.

    Normalisation alone gives a diagonal M = 1/(255·σ) and o = −μ/σ; a colour map `A·x + b` behind
    it makes them A·M and A·o + b.
    """
    mean = torch.tensor(backbone.preprocess.mean, dtype=torch.float64)
    std = torch.tensor(backbone.preprocess.std, dtype=torch.float64)
    matrix, offset = torch.diag(1 / (255 * std)), -mean / std
    if backbone.colours is not None:
        colours = backbone.colours.matrix.double()
        matrix, offset = colours @ matrix, colours @ offset + backbone.colours.offset.double()
    return matrix, offset


def _fold_normalisation(visual: Any, matrix: Tensor, offset: Tensor) -> bool:
    """Fold M and o into the patch convolution: `W' = W·M`, `b' = b + ΣW·o` (METHOD 9).

    Return whether the tower has one that can take them.
    """
    convolution = _patch_convolution(visual)
    if convolution is None:
        return False
    weight = convolution.weight.detach().double()
    scaled = torch.einsum("oihw,ij->ojhw", weight, matrix)
    shift = torch.einsum("oihw,i->o", weight, offset)
    bias = convolution.bias
    shift = shift if bias is None else bias.detach().double() + shift
    convolution.weight = nn.Parameter(scaled.float(), requires_grad=False)
    convolution.bias = nn.Parameter(shift.float(), requires_grad=False)
    return True


def _patch_convolution(visual: Any) -> nn.Conv2d | None:
    """Return an unpadded first convolution, or None."""
    trunk = getattr(visual, "trunk", None)  # of a timm model
    patch_embedding = getattr(trunk, "patch_embed", None)
    for layer in (getattr(visual, "conv1", None), getattr(patch_embedding, "proj", None)):
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            return layer if layer.padding in ((0, 0), "valid") else None
    return None
