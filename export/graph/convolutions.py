"""Fuse batch norms and training-time branches into convolutions."""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_TOLERANCE = 1e-4  # features are of the order of one


@torch.no_grad()
def simplified_convolutions(visual: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return the tower with parallel branches and batch norms merged into its convolutions.

    The tower is run to find out which norm follows which convolution, and whether the merged tower
    gives the same features; if not, the tower itself is returned.

    Args:
        visual: `model.visual` of an open_clip model, in evaluation mode.
        size: height and width of its images, in pixels.
    """
    from timm.utils.model import reparameterize_model

    if not any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        return visual
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, *size, generator=draw).to(next(visual.parameters()))
    merged = reparameterize_model(copy.deepcopy(visual), inplace=True).eval()
    for norm, convolution in _fusable(merged, pixels).items():
        _replace(merged, convolution, fuse_conv_bn_eval(convolution, norm))
        _replace(merged, norm, _activation(norm))
    merged.eval()  # new modules start in training mode
    same = torch.allclose(_features(merged, pixels), _features(visual, pixels), atol=_TOLERANCE)
    return merged if same else visual


def _fusable(visual: nn.Module, pixels: Tensor) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Return the batch norms whose input is the output of a convolution, with that convolution.

    Both must be in one block, for the output of a block may be read elsewhere as well.
    """
    block = {child: module for module in visual.modules() for child in module.children()}
    last: list[tuple[nn.Conv2d, Tensor]] = []  # keeps the output alive, so that it stays unique
    fusable: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after(convolution: nn.Conv2d, _: nn.Module, __: Any, output: Tensor) -> None:
        last[:] = [(convolution, output)]

    def before(norm: nn.BatchNorm2d, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for convolution, output in last:
            if output is inputs[0] and block[convolution] is block[norm]:
                fusable[norm] = convolution

    with ExitStack() as stack:
        for module in visual.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(partial(after, module)).remove)
            elif isinstance(module, nn.BatchNorm2d):
                stack.callback(module.register_forward_pre_hook(partial(before, module)).remove)
        visual(pixels)
    return fusable


def _activation(norm: nn.BatchNorm2d) -> nn.Module:
    """Return the activation that timm's norms contain."""
    parts = (getattr(norm, name, None) for name in ("drop", "act"))
    rest = [part for part in parts if isinstance(part, nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in root.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


def _features(visual: nn.Module, pixels: Tensor) -> Float[Tensor, "batch dim"]:
    features: Tensor | tuple[Tensor, ...] = visual(pixels)
    return features[0] if isinstance(features, tuple) else features
