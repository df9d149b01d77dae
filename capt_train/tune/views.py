"""Augmented views of the training images, embedded once, so that a step runs only trained parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from capt_deploy.core.console import progress, say
from capt_deploy.data.datasets import Dataset, Item
from capt_train import parallel
from capt_train.clip.backbone import Backbone
from capt_train.data.features import read_pixels
from capt_train.method.learner import Learner

_BATCH = 64
_MUCH_MEMORY = 2**30  # bytes of tokens; more is announced


@dataclass(frozen=True)
class Views:
    """Views of images after the frozen part of the tower; view 0 is the image itself."""

    embeddings: Float[Tensor, "views samples dim"]  # f⁰, unit norm, colours mapped
    # after the attention of the first changed block; half precision is enough to train on
    tokens: Float[Tensor, "views samples tokens width"] | None

    @property
    def trained(self) -> int:
        """Return the number of views trained on: all but the last of several (ours)."""
        return max(1, len(self.embeddings) - 1)

    @property
    def held(self) -> int:
        """Return the index of the last view, which shows how the model does on unseen images."""
        return len(self.embeddings) - 1

    def with_rows(self, chosen: Bool[Tensor, " samples"]) -> "Views":
        """Return the views of some of the images."""
        tokens = None if self.tokens is None else self.tokens[:, chosen]
        return Views(self.embeddings[:, chosen], tokens)

    def held_embeddings(self, learner: Learner | None) -> Float[Tensor, "samples dim"]:
        """Return embeddings of the held view by the learner, or by the frozen tower without one."""
        if learner is None or learner.visual is None or self.tokens is None:
            return self.embeddings[self.held]
        return learner.embed_tokens(self.tokens[self.held])


def embed_views(
    backbone: Backbone,
    learner: Learner,
    dataset: Dataset,
    items: Sequence[Item],
    *,
    views: int,
    area: float,
    seed: int,
    label: str,
    workers: int | None = None,
) -> Views:
    """Decode images, augment them and run the frozen part of the tower.

    Args:
        backbone: the frozen model, without a colour map.
        learner: a new learner; its visual part decides where tokens are taken. Without a visual
            part there are no tokens.
        dataset: where the images lie.
        items: readable images, in the order of the training features.
        views: the number of views of each image, at least 1.
        area: the smallest share of the image that an augmented view shows.
        seed: seed of the augmentation.
        label: first words of the progress line.
        workers: the number of threads that decode.

    Raises:
        ImageError: an image that could be read before cannot be read now.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings: list[Tensor] = []
    tokens: Tensor | None = None
    with progress(f"embedding views of {label}", len(items), "images") as counter:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            pixels = read_pixels(backbone, dataset, batch, workers)
            rows = [pixels, *(augment(pixels, area, generator) for _ in range(views - 1))]
            encoded = [_start(learner, view) for view in rows]
            embeddings.append(torch.stack([features.cpu() for features, _ in encoded]))
            for view, (_, kept) in enumerate(encoded):
                if kept is None:
                    continue
                if tokens is None:
                    tokens = _room((views, len(items), *kept.shape[1:]), label)
                tokens[view, start : start + len(batch)] = kept.half()
            counter.advance(len(batch))
    return Views(torch.cat(embeddings, dim=1), tokens)


def _start(
    learner: Learner, pixels: UInt8[Tensor, "batch height width 3"]
) -> tuple[Float[Tensor, "batch dim"], Tensor | None]:
    """Return embeddings and tokens as `Learner.start`; each process encodes its share."""
    features, tokens = learner.start(parallel.split_rows(pixels))
    if tokens is not None:
        tokens = parallel.gather_rows(tokens, len(pixels))
    return parallel.gather_rows(features, len(pixels)), tokens


def _room(shape: tuple[int, ...], label: str) -> Tensor:
    """Return the memory for all tokens at once; joining parts would need twice as much.

    More than a gigabyte is announced before it is used.
    """
    size = math.prod(shape) * torch.float16.itemsize
    if size > _MUCH_MEMORY:
        say(f"note: tokens of {label} need {size / 2**30:.1f} GiB of memory")
    return torch.empty(shape, dtype=torch.float16)


def augment(
    pixels: UInt8[Tensor, "batch height width 3"], area: float, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Return random crops of `area` up to the whole of each image, half of them mirrored.

    A crop keeps the proportions and is scaled back to the size of the image.
    """
    count = len(pixels)
    share = area + (1 - area) * torch.rand(count, generator=generator)
    side = share.sqrt()
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - side)[:, None]
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = side * mirror, side, shift
    images = pixels.permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    crops = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return crops.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)
