"""Tuned LayerNorms in the last blocks of the visual tower, as the first stage of 2SFS."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart

_SCALE = 0.1  # gains are of the order of one: smaller steps than those of other parts


class LayerNorms(VisualPart):
    """Updates of gains and biases of the LayerNorms, 2SFS (arXiv 2503.11609); start at 0.

    2SFS tunes those of all blocks; in the last ones, cached tokens stay usable (ours).
    """

    only_weights = True

    def __init__(self, tower: Tower, depth: int) -> None:
        super().__init__()
        blocks = range(max(0, tower.depth - depth), tower.depth)
        self.keeps_up_to = blocks.start - 1
        self._names = _weights(tower, blocks)
        shapes = [tower.weight(name).shape for name in self._names]
        self.updates = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "LayerNorms":
        """Return updates in the last `visual.norm_depth` blocks."""
        return cls(tower, context.config.visual.norm_depth)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have the part; None where it can."""
        if _weights(tower, range(tower.depth)):
            return None
        return "the visual tower has BatchNorm, not LayerNorm"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return a tenth of the trained numbers."""
        return {name: _SCALE * u for name, u in zip(self._names, self.updates, strict=True)}

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ into the updates."""
        for update in self.updates:
            update.data *= strength


def _weights(tower: Tower, blocks: range) -> tuple[str, ...]:
    """Return the names of gains and biases."""
    return tuple(
        f"{name}.{parameter}"
        for block in blocks
        for name, layer in tower.layers(block).items()
        if isinstance(layer, nn.LayerNorm)
        for parameter, _ in layer.named_parameters(recurse=False)
    )
