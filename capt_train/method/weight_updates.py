"""Parts that only change weights of the visual tower, merged at export: LoRA and LayerNorms."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, VisualPart

# Of the trained numbers. CLIP-LoRA trains at a rate of 2e-4, a tenth of `visual.learning_rate`;
# gains are of the order of one, and need smaller steps than other parts.
_SCALE = 0.1


class LoRA(VisualPart):
    """`W ← W + κ·B·A` of rank 2 for query, key and value, as CLIP-LoRA, and for both FFN layers.

    CLIP-LoRA (arXiv 2405.18541) updates all blocks of both towers; in the last blocks of the visual
    one alone, cached tokens stay usable and a step is cheap (ours). B starts at 0.
    """

    only_weights = True

    def __init__(self, tower: Tower, depth: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        blocks = range(max(0, tower.depth - depth), tower.depth)
        self.keeps_up_to = blocks.start - 1
        stacks = {name: n for block in blocks for name, n in tower.linear_weights(block).items()}
        self._names = tuple(stacks)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, stack in stacks.items():
            rows, width = tower.weight(name).shape
            start = torch.randn(stack, rank, width, generator=generator) / width**0.5
            self.down.append(nn.Parameter(start))
            self.up.append(nn.Parameter(torch.zeros(stack, rows // stack, rank)))

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "LoRA":
        """Return updates of rank `visual.lora_rank` in the last `visual.lora_depth` blocks."""
        visual = context.config.visual
        return cls(tower, visual.lora_depth, visual.lora_rank, context.generator)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have LoRA; None where it can."""
        return None if tower.has_tokens else "LoRA needs the attention and FFN of a ViT"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return 0.1·B·A of each weight."""
        products = (up @ down for up, down in zip(self.up, self.down, strict=True))
        return {
            name: _SCALE * product.flatten(0, 1)
            for name, product in zip(self._names, products, strict=True)
        }

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ into B."""
        for up in self.up:
            up.data *= strength


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
