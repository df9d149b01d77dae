"""The visual side: trained parts in the blocks of the frozen ViT, in the order of their entries."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import VisualPart, times


@dataclass(frozen=True)
class Encoded:
    """Images after the tower."""

    embeddings: Float[Tensor, "batch dim"]  # unit norm
    gates: tuple[Float[Tensor, "batch _"], ...]  # of every router


class VisualTuner(nn.Module):
    """The trained parts of the visual side; the frozen tower is an argument, not a submodule.

    `prefix` runs the tower up to block `start` once per image, and its tokens may be cached;
    `forward` does the rest. With new parts, the result is bit-equal to the frozen tower's.
    """

    alpha: Tensor | None  # at inference: the mean of s·cᵞ over the training images
    strength: Tensor | None  # κ; both are None once they are folded

    def __init__(self, tower: Tower, parts: Mapping[str, VisualPart]) -> None:
        """Put the parts, by their names, into the tower they were built for."""
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self._parts = tuple(parts.values())  # the same, with their type
        self.start = min([tower.depth - 1, *(part.keeps_up_to for part in self._parts)])
        self.register_buffer("alpha", torch.tensor(1.0))
        self.register_buffer("strength", torch.tensor(1.0), persistent=False)

    @property
    def starts_frozen(self) -> bool:
        """Tell whether new parts leave the tower's output as it is."""
        return all(part.starts_frozen for part in self._parts)

    def set_constants(self, *, alpha: float | None = None, strength: float | None = None) -> None:
        """Set α or κ."""
        for constant, value in ((self.alpha, alpha), (self.strength, strength)):
            if constant is None:
                raise ValueError("a folded copy has no constants to set")
            if value is not None:
                constant.fill_(value)

    def prefix(
        self, tower: Tower, images: Float[Tensor, "batch 3 rows columns"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after the attention of block `start`, before anything is changed."""
        return tower.prefix(images, self.start)

    def forward(
        self,
        tower: Tower,
        tokens: Float[Tensor, "batch tokens width"],
        alpha: Float[Tensor, " batch"] | None = None,
        *,
        shortcut: bool = False,
    ) -> Encoded:
        """Run the rest of the tower.

        Args:
            tower: the one this was made for, or a copy of it.
            tokens: from `prefix`.
            alpha: s·cᵞ of each image, in training; otherwise the constant `alpha` holds.
            shortcut: compute only the class token in the last block, where nothing else is read:
                faster, and equal but for rounding.
        """
        updates = {
            name: times(self.strength, update)
            for part in self._parts
            for name, update in part.weight_updates().items()
        }
        return tower.with_updates(updates, lambda: self._rest(tower, tokens, alpha, shortcut))

    def _rest(self, tower: Tower, tokens: Tensor, alpha: Tensor | None, shortcut: bool) -> Encoded:
        scaled = self.alpha if alpha is None else alpha[:, None, None]
        scaled = None if scaled is None else times(self.strength, scaled)
        routed: list[Tensor] = []
        for block in range(max(self.start, 0), tower.depth):
            first_only = shortcut and tower.pools_class_token and block == tower.depth - 1
            tokens = self._attended(tower, block, tokens, first_only)
            for part in self._parts:
                tokens = part.after_attention(block, tokens, scaled)
            update = None
            for part in self._parts:
                added, gates = part.feed_forward(tower, block, tokens, self.strength)
                routed += [] if gates is None else [gates]
                if added is not None:
                    update = added if update is None else update + added
            tokens = tower.feed(block, tokens, update)
        for part in self._parts:
            tokens = part.before_pooling(tokens)
        features = tower.pool(tokens)
        return Encoded(functional.normalize(features.float(), dim=-1), tuple(routed))

    def folded(self) -> "VisualTuner":
        """Return a copy for inference, with α and κ multiplied into its weights (METHOD 9)."""
        folded = copy.deepcopy(self)
        if folded.alpha is None or folded.strength is None:
            raise ValueError("a folded copy cannot be folded again")
        for part in folded._parts:
            part.fold(folded.alpha * folded.strength, folded.strength)
        folded.alpha = folded.strength = None
        return folded

    @torch.no_grad()
    def merge(self, visual: nn.Module) -> "VisualTuner | None":
        """Add folded updates of weights to a tower in place; return what remains, None if nothing.

        Args:
            visual: a copy of the tower that the parts were built for.
        """
        for part in self._parts:
            for name, update in part.weight_updates().items():
                visual.get_parameter(name).add_(update)
        remaining = {name: part for name, part in self.parts.items() if not part.only_weights}
        self.parts = nn.ModuleDict(remaining)
        self._parts = tuple(part for part in self._parts if not part.only_weights)
        return self if self._parts else None

    def layers_read(self, tower: Tower) -> tuple[nn.Module, ...]:
        """Return the tower's layers whose weights the parts read, so that they must stay."""
        return tuple(layer for part in self._parts for layer in part.layers_read(tower))

    def _attended(self, tower: Tower, block: int, tokens: Tensor, first_only: bool) -> Tensor:
        if block == self.start:  # cached tokens have been through this attention
            return tokens[:, :1] if first_only else tokens
        for part in self._parts:
            tokens = part.before_attention(block, tokens)
        return tower.attend(block, tokens, first_only)
