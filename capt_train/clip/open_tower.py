"""Find the pieces of a tower, whatever its architecture."""

from functools import partial

import torch
from torch import nn

from capt_train.clip.conv_tower import ConvTower
from capt_train.clip.vision_tower import EvaTower, OpenClipTower, TimmTower, Tower

_TOLERANCE = 1e-4  # of features that are of the order of one


@torch.no_grad()
def open_tower(visual: nn.Module, size: tuple[int, int]) -> Tower | None:
    """Return the tower in pieces, or None where its tokens cannot be reached.

    The pieces are tested: on random pixels they must give the same features as the tower itself.

    Args:
        visual: `model.visual` of an open_clip model.
        size: height and width of its images, in pixels.
    """
    parameter = next(visual.parameters())
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(parameter)
    expected = visual(pixels)
    expected = expected[0] if isinstance(expected, tuple) else expected  # CoCa: tokens as well
    for kind in (OpenClipTower, TimmTower, EvaTower, partial(ConvTower, pixels=pixels)):
        try:
            tower: Tower = kind(visual)
            tokens = tower.prefix(pixels, 0)
            for block in range(tower.depth):
                tokens = tower.feed(block, tokens if block == 0 else tower.attend(block, tokens))
            whole = tokens.shape[1] == tower.leading + tower.grid[0] * tower.grid[1]
            if whole and torch.allclose(tower.pool(tokens), expected, atol=_TOLERANCE):
                return tower
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            continue  # another architecture
    return None
