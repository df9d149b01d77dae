"""A convolutional or hybrid tower in pieces, whose tokens are the positions of a feature map."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capt_train.clip.vision_tower import FeedForward, MapShape, Tower, named_layers

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_TOLERANCE = 1e-4  # of feature maps that are of the order of one


class ConvTower(Tower):
    """A tower that runs its layers one after the other: EfficientNet, ResNet, ConvNeXt, FastViT.

    Its last block is the pooling, which gives a single token, and the linear projection behind it;
    every other block ends in a module with layers of its own. `attend` runs a block, and `feed`
    adds what parts add.
    """

    leading = 0
    pools_class_token = True
    has_tokens = False

    def __init__(self, visual: Any, pixels: Tensor) -> None:
        """Find the blocks by running the layers.

        Args:
            visual: `model.visual` of an open_clip model.
            pixels: two images, to see what the layers return.

        Raises:
            ValueError: the tower does not run its layers one after the other.
        """
        self._visual = visual
        trunk = getattr(visual, "trunk", None)
        feature_map = None if trunk is None else trunk.forward_features(pixels)
        values = pixels
        maps: dict[str, Tensor] = {}  # behind each layer
        for name in _layers(visual, "" if trunk is None else "trunk."):
            values = visual.get_submodule(name)(values)
            if values.dim() != 4:
                break
            maps[name] = values
        names = [*maps]
        if feature_map is not None:
            ends = [place for place, m in enumerate(maps.values()) if _same(m, feature_map)]
            names = names[: ends[-1] + 1] if ends else []
        if not names:
            raise ValueError("the tower does not run its layers one after the other")
        self._pieces: list[list[str]] = [[]]  # names of the layers of each block
        shapes: list[MapShape] = []
        for layer in names:
            self._pieces[-1].append(layer)
            if _is_block(visual.get_submodule(layer)):
                shapes.append(_shape(maps[layer]))
                self._pieces.append([])
        self._tail = self._pieces.pop()  # layers between the last block and the pooling
        self._pooling = name if trunk is None else None
        last = maps[names[-1]]
        # whether the linear projection behind the pooling can be reached
        self._splits = trunk is not None and self._pooled(last).dim() == 2
        pooled = self._pooled(last) if self._splits else self._features(last)
        shapes.append(MapShape(pooled.shape[-1], (1, 1)))
        self._shapes = shapes
        self._grids = [_shape(pixels).grid, *(shape.grid for shape in shapes)]  # before each block
        super().__init__(visual, range(len(shapes)), pooled.shape[-1], (1, 1))

    def shape(self, block: int) -> MapShape:  # noqa: D102
        return self._shapes[block]

    def embed(self, images: Tensor) -> Tensor:  # noqa: D102
        raise NotImplementedError("images enter through `prefix`")

    def prefix(self, images: Tensor, block: int) -> Tensor:  # noqa: D102
        values = images
        for names in self._pieces[: block + 1]:
            values = self._run(names, values)
        return self._last(values) if block == self.depth - 1 else _tokens(values)

    def attend(self, block: int, tokens: Tensor, first_only: bool = False) -> Tensor:  # noqa: D102
        # contiguous, so that convolutions round as in the tower itself
        values = tokens.transpose(1, 2).unflatten(2, self._grids[block]).contiguous()
        if block == self.depth - 1:
            return self._last(values)
        return _tokens(self._run(self._pieces[block], values))

    def before_ffn(self, block: int, tokens: Tensor) -> Tensor:  # noqa: D102
        # in float32: half precision overflows in the sum of squares
        return nn.functional.layer_norm(tokens.float(), tokens.shape[-1:]).to(tokens.dtype)

    def ffn(self, block: int) -> FeedForward | None:  # noqa: D102
        return None

    def feed(self, block: int, tokens: Tensor, update: Tensor | None = None) -> Tensor:  # noqa: D102
        if block == self.depth - 1 and self._splits:
            tokens = self._project(tokens)
        return tokens if update is None else tokens + update

    def pool(self, tokens: Tensor) -> Tensor:  # noqa: D102
        return tokens[:, 0]

    def layers(self, block: int) -> dict[str, nn.Module]:  # noqa: D102
        last = block == self.depth - 1
        return named_layers(self._visual, self._tail if last else self._pieces[block])

    def linear_weights(self, block: int) -> dict[str, int]:  # noqa: D102
        return {}

    def _run(self, names: Sequence[str], values: Tensor) -> Tensor:
        # by name, for lowering the precision of a tower replaces its layers
        for name in names:
            values = self._visual.get_submodule(name)(values)
        return values

    def _last(self, values: Tensor) -> Tensor:
        values = self._run(self._tail, values)
        pooled = self._pooled(values) if self._splits else self._features(values)
        return pooled[:, None]

    def _pooled(self, values: Tensor) -> Tensor:
        """Return the pooled features in front of the linear projection."""
        return self._visual.trunk.forward_head(values, pre_logits=True)  # type: ignore[no-any-return]

    def _project(self, pooled: Tensor) -> Tensor:
        classifier = self._visual.trunk.get_classifier()
        return self._visual.head(classifier(pooled))  # type: ignore[no-any-return]

    def _features(self, values: Tensor) -> Tensor:
        if self._pooling:
            return self._visual.get_submodule(self._pooling)(values)  # type: ignore[no-any-return]
        return self._visual.head(self._visual.trunk.forward_head(values))  # type: ignore[no-any-return]


def _layers(visual: nn.Module, start: str = "") -> Iterator[str]:
    """Yield the names of the tower's layers; those of stages one by one."""
    for name, child in visual.get_submodule(start.removesuffix(".")).named_children():
        stage = isinstance(child, (nn.Sequential, nn.ModuleList)) or hasattr(child, "blocks")
        yield from _layers(visual, f"{start}{name}.") if stage else (f"{start}{name}",)


def _is_block(layer: nn.Module) -> bool:
    return any(True for _ in layer.children()) and not isinstance(layer, _NORMS)


def _shape(values: Tensor) -> MapShape:
    return MapShape(values.shape[1], (values.shape[2], values.shape[3]))


def _tokens(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2)


def _same(values: Tensor, others: Tensor) -> bool:
    return values.shape == others.shape and torch.allclose(values, others, atol=_TOLERANCE)
