"""Fit or read the colour map of a run, and embed its images through it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from capt_deploy.core.console import say
from capt_deploy.core.errors import ImageError
from capt_deploy.core.files import write_json
from capt_deploy.data.datasets import Item
from capt_train.clip.backbone import Backbone
from capt_train.data.features import Embedded, Features, embed, read_pixels
from capt_train.parallel import agreed
from capt_train.run.colours import ColourFit, fit_colours
from capt_train.run.folder import COLOURS, read_colours
from capt_train.run.setup import Setup

_MOST = 256  # images to fit on; twelve numbers need no more


def recolour(setup: Setup, frozen: Embedded, out: Path) -> tuple[Backbone, Embedded]:
    """Return the backbone with the run's colour map, and the images embedded through it.

    A resumed run reuses the map that it has written.

    Args:
        setup: the run's setup.
        frozen: training and validation embeddings by the frozen model.
        out: the run folder.

    Raises:
        ImageError: an image that could be read before cannot be read now.
    """
    backbone, config = setup.backbone, setup.config
    if "colours" not in config.parts:
        return backbone, frozen
    if (out / COLOURS).exists():
        fit = read_colours(out)
    else:
        fit = agreed(_fit(setup, frozen.train))
        write_json(out / COLOURS, fit.to_dict())
    if fit.colours is None:
        say(f"colours of the input stay unchanged ({_reason(fit)})")
        return backbone, frozen
    say(f"colours of the input are mapped ({_reason(fit)})")
    mapped = backbone.recoloured(fit.colours)
    split = setup.split

    def embed_again(before: Features, items: Sequence[Item], name: str) -> Features:
        kept, label = before.kept(items), f"recoloured {name} images"
        encode, workers = mapped.image_embeddings, config.workers
        after = embed(backbone, None, setup.dataset, kept, label, encode, workers)
        if after.skipped:  # rows would belong to other images
            raise ImageError(f"{after.skipped[0].path}: could be read before, but not now")
        return replace(after, skipped=before.skipped)

    train = embed_again(frozen.train, split.train, "training")
    return mapped, Embedded(train, embed_again(frozen.val, split.val, "validation"))


def _reason(fit: ColourFit) -> str:
    if not fit.standard_error:
        return "there are too few training images to judge a map"
    return (
        f"mapping changes the zero-shot loss by {-fit.gain:+.3f}, "
        f"standard error {fit.standard_error:.3f}"
    )


def _fit(setup: Setup, train: Features) -> ColourFit:
    """Fit the map on training images, at most a fixed number, drawn by seed."""
    draw = torch.Generator().manual_seed(setup.config.seed)
    rows = torch.randperm(len(train), generator=draw)[:_MOST]
    items = train.kept(setup.split.train)
    return fit_colours(
        setup.backbone,
        setup.zero_shot[list(setup.split.tuned)],
        read_pixels(
            setup.backbone,
            setup.dataset,
            [items[row] for row in rows.tolist()],
            setup.config.workers,
        ),
        train.labels_among(setup.split.tuned)[rows],
        train.embeddings[rows],
    )
