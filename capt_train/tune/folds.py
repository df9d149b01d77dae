"""Folds of the photos, and of the classes: what is tuned on and what judges it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_train.tune.stages import TuningTask

_FOLDS = 4
_MOST_VALIDATED = 2000  # images that judge; more would hardly decide otherwise
_MANY = 1000  # classes; of more, only some of the held-out images judge and calibrate
_MOST_SCORES = 5_000_000  # images × many classes; more would fill the memory
_ALIKE = 0.4
# Photos of a class that are compared: two differ from their mean in opposite ways, and the
# similarities of thousands would take minutes
_FEWEST_LINKED, _MOST_LINKED = 3, 500


@dataclass(frozen=True)
class Fold:
    """One tuning on a part of the photos, and the images that judge it."""

    task: TuningTask  # remaining images of the remaining classes
    classes: tuple[int, ...]  # all tuned classes of the run
    reference: Float[Tensor, "classes dim"]  # their t⁰
    inside: Bool[Tensor, " classes"]  # of the run's tuned classes: those that are tuned on here
    # Held-out training images, then validation images; of many classes, some of them
    images: Float[Tensor, "held dim"]
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
    photo_fold = photo_folds(labels, task.train.embeddings, class_fold, count)
    most = min(_MOST_VALIDATED, most_judging(classes))
    validated = torch.randperm(len(task.val), generator=draw)[:most]
    validation = task.val.rows(validated)
    without_validation = replace(task, val=task.val.rows(validated[:0]))
    for number in range(count) if held_classes else photo_fold.clamp(min=0).unique().tolist():
        inside = class_fold != number
        held = ~inside[labels] | (photo_fold == number)
        judging = held.nonzero().squeeze(1)
        judging = judging[judging_rows(len(judging), classes, task.config.seed)]
        yield Fold(
            without_validation.with_rows(~held).among(inside).with_new_bank(),
            task.tuned,
            task.reference,
            inside,
            torch.cat([task.train.embeddings[judging], validation.embeddings]),
            torch.cat([labels[judging], validation.labels_among(task.tuned)]),
            torch.cat([judging, len(labels) + validated]),
        )


def most_judging(classes: int) -> int:
    """Return how many held-out images judge at most in each fold, and calibrate without folds."""
    return sys.maxsize if classes <= _MANY else max(1, _MOST_SCORES // classes)


def judging_rows(images: int, classes: int, seed: int) -> Int[Tensor, " judging"]:
    """Return which of the held-out images judge and calibrate, ascending; drawn by the seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(images, generator=draw)[: most_judging(classes)].sort().values


def photo_folds(
    labels: Int[Tensor, " samples"],
    embeddings: Float[Tensor, "samples dim"],
    class_fold: Int[Tensor, " classes"],
    count: int,
) -> Int[Tensor, " samples"]:
    """Return the fold that holds out each photo, one that tunes on its class; -1 for none.

    Photos of one burst, which are nearly the same, are held out together: a model that has seen
    one of them would answer the others better than any photo in use.

    Args:
        labels: positions among the tuned classes.
        embeddings: by the frozen model, unit norm.
        class_fold: the fold that leaves out each class; -1 for none.
        count: number of folds.
    """
    folds = torch.full_like(labels, -1)
    for label, left_out in enumerate(class_fold.tolist()):
        photos = (labels == label).nonzero().squeeze(1)
        usable = [fold for fold in range(count) if fold != left_out]
        if len(usable) == 1:  # every second burst is never held out, so that some are tuned on
            usable.append(-1)
        bursts = _bursts(embeddings[photos])
        if len(photos) < 2:
            continue
        if len(bursts) < 2:  # all are the same photo
            bursts = [[photo] for photo in range(len(photos))]
        loads = dict.fromkeys(usable, 0)
        for burst in sorted(bursts, key=len, reverse=True):
            fold = min(loads, key=loads.__getitem__)
            folds[photos[burst]] = fold
            loads[fold] += len(burst)
    return folds


def _bursts(embeddings: Float[Tensor, "photos dim"]) -> list[list[int]]:
    """Return the photos of a class in groups whose members are all alike, by complete linkage.

    Photos are alike if they differ from the mean of their class in the same way: a cosine of 0.4 of
    these differences. Where photos are unrelated, 1 % of the pairs are (training photos of
    `clothes` and `objects`, 8 and 16 a class; ours).
    """
    photos = len(embeddings)
    if not _FEWEST_LINKED <= photos <= _MOST_LINKED:
        return [[photo] for photo in range(photos)]
    differences = embeddings.double().cpu() - embeddings.double().cpu().mean(dim=0)
    differences /= differences.norm(dim=1, keepdim=True).clamp(min=1e-9)
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(differences.numpy(), "complete", metric="sqeuclidean")  # 2 − 2·cosine
    groups: dict[int, list[int]] = {}
    for photo, group in enumerate(fcluster(tree, 2 - 2 * _ALIKE, "distance").tolist()):
        groups.setdefault(group, []).append(photo)
    return sorted(groups.values())
