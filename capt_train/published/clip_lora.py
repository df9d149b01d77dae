"""CLIP-LoRA (arXiv 2405.18541): low-rank updates of query, key and value in both towers."""

from collections.abc import Mapping

from torch import Tensor

from capt_train.clip.backbone import Backbone
from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext
from capt_train.method.weight_updates import LoRA, LowRank, TextUpdates

# α/√r of the authors' code, where the paper has α/r. They also drop a quarter of what goes into
# the updates at random, which updates of weights cannot have.
_RANK, _SCALE = 2, 2**-0.5


class TextLoRA(TextUpdates):
    """Updates of all blocks of the text tower."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__(context)
        text = context.backbone.text
        shapes = {
            name: (stack, *text.weight(name).shape)
            for name, stack in text.attention_weights().items()
        }
        self.products = LowRank(shapes, _RANK, _SCALE, context.generator)

    @classmethod
    def obstacle(cls, backbone: Backbone) -> str | None:
        """Return why this model cannot have the part; None where it can."""
        if backbone.text.attention_weights():
            return None
        return "the attention of the text tower is not open_clip's own"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return the scaled B·A of each weight."""
        return self.products.forward()


class VisualLoRA(LoRA):
    """Updates of all blocks of the visual tower."""

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "VisualLoRA":
        """Return updates of the attention of all blocks."""
        blocks = range(tower.depth)
        stacks = {
            name: stack
            for block in blocks
            for name, stack in tower.attention_weights(block).items()
        }
        return cls(tower, blocks, stacks, _RANK, _SCALE, context.generator)
