"""Folds of the photos, and of the classes: what is tuned on and what judges it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_train.tune.stages import TuningTask

_FOLDS = 4
_MOST_VALIDATED = 2000  # images that judge; more would hardly decide otherwise


@dataclass(frozen=True)
class Fold:
    """One tuning on a part of the photos, and the images that judge it."""

    task: TuningTask  # remaining images of the remaining classes
    classes: tuple[int, ...]  # all tuned classes of the run
    reference: Float[Tensor, "classes dim"]  # their t⁰
    inside: Bool[Tensor, " classes"]  # of the run's tuned classes: those that are tuned on here
    images: Float[Tensor, "held dim"]  # held-out training images, then validation images
    labels: Int[Tensor, " held"]  # positions among the run's tuned classes
    places: Int[Tensor, " held"]  # of these images among all training and validation images

    def group(self, name: str) -> Bool[Tensor, " held"]:
        """Return which images are of tuned or of new classes."""
        inside = self.inside[self.labels]
        return inside if name == "tuned" else ~inside

    def columns(self, name: str) -> Int[Tensor, " columns"]:
        """Return the classes that images of a group are told apart among."""
        return (self.inside if name == "tuned" else ~self.inside).nonzero().squeeze(1)


def make_folds(task: TuningTask, *, held_classes: bool) -> Iterator[Fold]:
    """Yield the folds; with `held_classes`, each class is left out of one of them."""
    labels, draw = task.labels, torch.Generator().manual_seed(task.config.seed)
    classes = len(task.tuned)
    count = min(_FOLDS, classes // 2) if held_classes else _FOLDS
    class_fold = torch.full((classes,), -1)
    if held_classes:
        class_fold[torch.randperm(classes, generator=draw)] = torch.arange(classes) % count
    photo_fold = photo_folds(labels, class_fold, count)
    validated = torch.randperm(len(task.val), generator=draw)[:_MOST_VALIDATED]
    validation = task.val.rows(validated)
    without_validation = replace(task, val=task.val.rows(validated[:0]))
    for number in range(count) if held_classes else photo_fold.clamp(min=0).unique().tolist():
        inside = class_fold != number
        held = ~inside[labels] | (photo_fold == number)
        yield Fold(
            without_validation.with_rows(~held).among(inside).with_new_bank(),
            task.tuned,
            task.reference,
            inside,
            torch.cat([task.train.embeddings[held], validation.embeddings]),
            torch.cat([labels[held], validation.labels_among(task.tuned)]),
            torch.cat([held.nonzero().squeeze(1), len(labels) + validated]),
        )


def photo_folds(labels: Tensor, class_fold: Tensor, count: int) -> Int[Tensor, " samples"]:
    """Return the fold that holds out each photo, one that tunes on its class; -1 for none.

    Args:
        labels: positions among the tuned classes.
        class_fold: the fold that leaves out each class; -1 for none.
        count: number of folds.
    """
    folds = torch.full_like(labels, -1)
    for label, left_out in enumerate(class_fold.tolist()):
        photos = (labels == label).nonzero().squeeze(1)
        usable = [fold for fold in range(count) if fold != left_out]
        if len(usable) == 1:  # every second photo is never held out, so that some are tuned on
            usable.append(-1)
        if len(photos) > 1:
            folds[photos] = torch.tensor(usable)[torch.arange(len(photos)) % len(usable)]
    return folds
