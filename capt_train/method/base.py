"""Base classes of parts: class prompts, transforms of class embeddings, hooks in the ViT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.clip.backbone import Backbone
from capt_train.clip.vision_tower import Tower
from capt_train.config import TrainConfig


@dataclass(frozen=True)
class BuildContext:
    """The inputs that a part may be built from."""

    backbone: Backbone
    config: TrainConfig
    class_names: tuple[str, ...]
    zero_shot: Float[Tensor, "classes dim"]  # hand-written t⁰ of every class
    # of each class's sentences, zeros where it has none; None where none were found
    centres: Float[Tensor, "kinds classes centres dim"] | None
    tuned: tuple[int, ...]  # indices of the tuned classes, ascending
    generator: torch.Generator  # for random starts
    teacher: Float[Tensor, "classes width"] | None = None  # class embeddings of a teacher
    prompts: Sequence["ClassPrompt"] = ()  # built before all other parts


class ClassPrompt(nn.Module):
    """Gives each class an embedding, by its name, in place of the hand-written prompt."""

    reads_images = False  # whether the embeddings depend on the image as well

    @classmethod
    def build(cls, context: BuildContext) -> Sequence["ClassPrompt"]:
        """Return the prompts before the first step; K of them where the settings say so."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, backbone: Backbone) -> str | None:
        """Return why this model cannot have the part; None where it can."""
        return None

    def forward(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "*batch classes dim"]:
        """Return the unit-norm embeddings of some classes, given by index.

        Args:
            classes: their indices.
            images: unit norm, for prompts that read images; the result is then one for each.
        """
        raise NotImplementedError

    def of_names(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of classes by name."""
        raise NotImplementedError


class ClassTransform(nn.Module):
    """A trained map of class embeddings; a function of each class alone, so that it folds."""

    by_epochs = True  # whether the training loop trains it; else it is fitted afterwards

    @classmethod
    def build(cls, context: BuildContext) -> "ClassTransform":
        """Return the transform before the first step."""
        raise NotImplementedError

    def forward(
        self, embeddings: Float[Tensor, "classes dim"], classes: Sequence[int] | None
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, "classes experts"] | None]:
        """Return the embeddings, unit norm as they came, and the gates of a router if any.

        Args:
            embeddings: of the classes, after the transforms before this one.
            classes: their indices; None for classes that are known by name alone.
        """
        raise NotImplementedError


class VisualPart(nn.Module):
    """Something trained in the blocks of the frozen tower; the hooks change nothing by default."""

    # The block after whose attention tokens may still be kept: nothing before that is changed.
    keeps_up_to: int
    starts_frozen = True  # whether a new part leaves the tower's output as it is, to the bit
    only_weights = False  # whether it does nothing but update weights, so that it can be merged

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "VisualPart":
        """Return the part before the first step."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, tower: Tower) -> str | None:
        """Return why this tower cannot have the part; None where it can."""
        return None

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return additions to weights of the tower at κ = 1, by the names of the weights.

        Only a part of `only_weights` may have any: they are merged at export.
        """
        return {}

    def before_attention(
        self, block: int, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch more width"]:
        """Return the tokens that go into the attention of a block."""
        return tokens

    def after_attention(
        self, block: int, tokens: Float[Tensor, "batch tokens width"], alpha: Tensor | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens behind the attention of a block.

        Args:
            block: its number.
            tokens: behind the residual connection.
            alpha: κ·s·cᵞ, one number or one for each image (batch, 1, 1); None once folded.
        """
        return tokens

    def feed_forward(
        self,
        tower: Tower,
        block: int,
        tokens: Float[Tensor, "batch tokens width"],
        strength: Tensor | None,
    ) -> tuple[Float[Tensor, "batch tokens width"] | None, Float[Tensor, "batch experts"] | None]:
        """Return the update of the output of a block's FFN, and the gates of a router.

        Args:
            tower: the frozen one.
            block: number of the block.
            tokens: before the FFN and its norm.
            strength: κ; None once folded.
        """
        return None, None

    def before_pooling(
        self, tokens: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch fewer width"]:
        """Return the tokens of the image alone."""
        return tokens

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Multiply κ·α and κ, constant at inference, into the weights (METHOD 9)."""

    def layers_read(self, tower: Tower) -> tuple[nn.Module, ...]:
        """Return the tower's layers whose weights the part reads, so that they must stay."""
        return ()


def times(factor: Tensor | None, values: Tensor) -> Tensor:
    """Return the product; the values as they are where the factor is folded."""
    return values if factor is None else factor * values
