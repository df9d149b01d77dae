"""Fuse what follows a convolution at inference: batch norms, and branches of training time."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_TOLERANCE = 1e-4  # of features that are of the order of one


@torch.no_grad()
def simplified_convolutions(visual: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return the tower with parallel branches and batch norms merged into its convolutions.

    Which norm follows which convolution is found by running the tower. Whether the result says
    the same is found likewise; a tower of which it does not is returned as it is.

    Args:
        visual: `model.visual` of an open_clip model, in evaluation mode.
        size: height and width of its images, in pixels.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        return visual
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, *size, generator=draw).to(next(visual.parameters()))
    own = _merged_branches(copy.deepcopy(visual)).eval()
    for norm, convolution in _followed(own, pixels).items():
        _replace(own, convolution, fuse_conv_bn_eval(convolution, norm))
        _replace(own, norm, _rest_of(norm))
    own.eval()  # new modules think that they are trained
    same = torch.allclose(_features(own, pixels), _features(visual, pixels), atol=_TOLERANCE)
    return own if same else visual


def _merged_branches(visual: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    # MobileOne's and RepVGG's blocks say themselves how their branches are added up.
    return reparameterize_model(visual, inplace=True)


def _followed(visual: nn.Module, pixels: Tensor) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Return, for each batch norm that gets what a convolution has just put out, the latter.

    Only where both are parts of one block: what leaves a block may be read elsewhere as well.
    """
    block = {child: module for module in visual.modules() for child in module.children()}
    outputs: list[tuple[nn.Conv2d, Tensor]] = []  # kept alive, so that no two are at one address
    found: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs[:] = [(module, output)]

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        for convolution, output in outputs:
            if output is inputs[0] and block[convolution] is block[module]:
                found[module] = convolution

    handles = []
    for module in visual.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(before))
    try:
        visual(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what else the module does; timm's norms have an activation of their own."""
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
