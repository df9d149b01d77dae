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
from capt_train.data.features import Embedded, Features, embed, every_second, read_pixels
from capt_train.run.folder import COLOURS, read_colours
from capt_train.run.setup import Setup
from capt_train.tune.colours import ColourFit, Labelled, fit_colours

_MOST = 1024  # images to fit on, and to decide on; twelve numbers need no more


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
        fit = _fit(setup, frozen)
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
    if not fit.gain:
        return "no map improves held-out images, or there are too few of them"
    return (
        f"the loss of held-out images falls by {fit.gain:.3f}, "
        f"standard error {fit.standard_error:.3f}"
    )


def _fit(setup: Setup, frozen: Embedded) -> ColourFit:
    """Fit on the training images; without validation images, on every other one of a class."""
    split, config, everything = setup.split, setup.config, frozen.train
    deciding, fitted = frozen.val.kept(split.val), everything.kept(split.train)
    if not deciding:
        odd = every_second(everything.labels).tolist()
        deciding = [item for item, chosen in zip(fitted, odd, strict=True) if chosen]
        fitted = [item for item, chosen in zip(fitted, odd, strict=True) if not chosen]
    return fit_colours(
        setup.backbone,
        setup.zero_shot[list(split.tuned)],
        _labelled(setup, fitted),
        _labelled(setup, deciding),
        steps=config.colours.steps,
        rate=config.colours.learning_rate,
        seed=config.seed,
    )


def _labelled(setup: Setup, items: Sequence[Item]) -> Labelled:
    """Decode images, at most a fixed number, drawn by seed."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(setup.config.seed))
    chosen = [items[place] for place in order[:_MOST].tolist()]
    tuned = torch.tensor(setup.split.tuned)
    labels = torch.searchsorted(tuned, torch.tensor([item.label for item in chosen]))
    return Labelled(
        read_pixels(setup.backbone, setup.dataset, chosen, setup.config.workers), labels
    )
