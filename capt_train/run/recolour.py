"""The colour map of a run: fitted once, written, and every image embedded through it."""

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

_MOST = 1024  # images on either side: twelve numbers need no more


def recolour(setup: Setup, frozen: Embedded, out: Path) -> tuple[Backbone, Embedded]:
    """Return the backbone that the run tunes on, and its images through it.

    A resumed run takes the map that it has written.

    Args:
        setup: of the run.
        frozen: training and validation images, by the model as it came.
        out: the run folder.

    Raises:
        ImageError: an image that could be read before cannot be read now.
    """
    backbone, config = setup.backbone, setup.config
    if "colours" not in config.parts:
        return backbone, frozen
    if (out / COLOURS).exists():
        found = read_colours(out)
    else:
        found = _fit(setup, frozen)
        write_json(out / COLOURS, found.to_dict())
    if found.colours is None:
        say(f"colours of the input stay as they are ({_told(found)})")
        return backbone, frozen
    say(f"colours of the input are mapped ({_told(found)})")
    seen = backbone.recoloured(found.colours)
    split = setup.split

    def again(own: Features, items: Sequence[Item], name: str) -> Features:
        label = f"recoloured {name} images"
        found = embed(backbone, None, setup.dataset, own.kept(items), label, seen.image_embeddings)
        if found.skipped:  # else rows would belong to other images
            raise ImageError(f"{found.skipped[0].path}: could be read before, but not now")
        return replace(found, skipped=own.skipped)

    train = again(frozen.train, split.train, "training")
    return seen, Embedded(train, again(frozen.val, split.val, "validation"))


def _told(found: ColourFit) -> str:
    if not found.gain:
        return "no map is better on images that were not fitted on, or there are too few of them"
    return (
        f"on images not fitted on, the NLL falls by {found.gain:.3f}, "
        f"standard error {found.standard_error:.3f}"
    )


def _fit(setup: Setup, frozen: Embedded) -> ColourFit:
    """Fit on the training images; where there is no validation, on every other one of a class."""
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
    """Decode images, of many a random part."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(setup.config.seed))
    chosen = [items[place] for place in order[:_MOST].tolist()]
    tuned = torch.tensor(setup.split.tuned)
    labels = torch.searchsorted(tuned, torch.tensor([item.label for item in chosen]))
    return Labelled(read_pixels(setup.backbone, setup.dataset, chosen), labels)
