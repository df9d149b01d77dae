"""Parts that only change weights of the towers: LoRA and LayerNorms."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.clip.backbone import all_templates
from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext, ClassPrompt, VisualPart

# Of the trained numbers. CLIP-LoRA trains at a rate of 2e-4, a tenth of `visual.learning_rate`;
# gains are of the order of one, and need smaller steps than other parts.
_SCALE = 0.1


class LowRank(nn.Module):
    """Updates s·B·A of weights; B starts at 0 (LoRA, arXiv 2106.09685)."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int, int]],
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        """Make the factors.

        Args:
            shapes: by the name of a weight: how many matrices are stacked in it, rows, columns.
            rank: of each update.
            scale: s.
            generator: for A.
        """
        super().__init__()
        self._names, self._scale = tuple(shapes), scale
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for stack, rows, width in shapes.values():
            start = torch.randn(stack, rank, width, generator=generator) / width**0.5
            self.down.append(nn.Parameter(start))
            self.up.append(nn.Parameter(torch.zeros(stack, rows // stack, rank)))

    def forward(self) -> dict[str, Tensor]:
        """Return the update of each weight."""
        products = (up @ down for up, down in zip(self.up, self.down, strict=True))
        return {
            name: self._scale * product.flatten(0, 1)
            for name, product in zip(self._names, products, strict=True)
        }


class LoRA(VisualPart):
    """`W ← W + κ·B·A` of rank 2 for query, key and value, as CLIP-LoRA, and for both FFN layers.

    CLIP-LoRA (arXiv 2405.18541) updates all blocks of both towers; in the last blocks of the visual
    one alone, cached tokens stay usable and a step is cheap (ours). B starts at 0.
    """

    only_weights = True

    def __init__(
        self,
        tower: Tower,
        blocks: range,
        stacks: Mapping[str, int],
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.keeps_up_to = blocks.start - 1
        shapes = {name: (stack, *tower.weight(name).shape) for name, stack in stacks.items()}
        self.products = LowRank(shapes, rank, scale, generator)

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "LoRA":
        """Return updates of rank `visual.lora_rank` in the last `visual.lora_depth` blocks."""
        visual = context.config.visual
        blocks = range(tower.depth)[-visual.lora_depth :]
        stacks = {name: n for block in blocks for name, n in tower.linear_weights(block).items()}
        return cls(tower, blocks, stacks, visual.lora_rank, _SCALE, context.generator)

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have LoRA; None where it can."""
        return None if tower.has_tokens else "LoRA needs the attention and FFN of a ViT"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return the scaled B·A of each weight."""
        return self.products.forward()

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ into B."""
        for up in self.products.up:
            up.data *= strength


class LayerNorms(VisualPart):
    """Updates of gains and biases of the LayerNorms, 2SFS (arXiv 2503.11609); start at 0.

    2SFS tunes those of all blocks; in the last ones, cached tokens stay usable (ours).
    """

    only_weights = True
    _scale = _SCALE

    def __init__(self, tower: Tower, blocks: range) -> None:
        super().__init__()
        self.keeps_up_to = blocks.start - 1
        self._names = _weights(tower, blocks)
        shapes = [tower.weight(name).shape for name in self._names]
        self.updates = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "LayerNorms":
        """Return updates in the last `visual.norm_depth` blocks."""
        return cls(tower, range(tower.depth)[-context.config.visual.norm_depth :])

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have the part; None where it can."""
        if _weights(tower, range(tower.depth)):
            return None
        return "the visual tower has BatchNorm, not LayerNorm"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return a tenth of the trained numbers."""
        return {name: self._scale * u for name, u in zip(self._names, self.updates, strict=True)}

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


class TextUpdates(ClassPrompt):
    """The hand-written prompt through a text tower whose weights are updated."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self._backbone, self._class_names = context.backbone, context.class_names
        self._templates = all_templates(context.config.prompt.templates)

    @classmethod
    def build(cls, context: BuildContext) -> list["TextUpdates"]:
        """Return the prompt before the first step."""
        return [cls(context)]

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return additions to weights of the text tower, by the names of the weights."""
        raise NotImplementedError

    def forward(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of some classes, given by index."""
        return self.of_names([self._class_names[index] for index in classes])

    def of_names(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of classes by name, the mean over the templates."""
        updates, by_template = self.weight_updates(), []
        for template in self._templates:
            tokens = self._backbone.tokenize([template.replace("{}", n) for n in class_names])
            by_template.append(self._backbone.text.encode(tokens, updates=updates))
        return functional.normalize(torch.stack(by_template).mean(dim=0), dim=-1)
