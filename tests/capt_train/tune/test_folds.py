"""Photos of one burst are held out together; others are spread as evenly as they can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from capt_train.tune.folds import photo_folds

DIM = 64


def unrelated(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(1 + torch.randn(count, DIM, generator=draw), dim=1)


def folds_of(labels: list[int], images: Tensor, left_out: list[int], count: int = 4) -> list[int]:
    return photo_folds(torch.tensor(labels), images, torch.tensor(left_out), count).tolist()


def test_unrelated_photos_are_spread_in_their_order() -> None:
    labels = [0] * 6 + [1] * 3 + [2] * 2 + [3]
    found = folds_of(labels, unrelated(12), [-1] * 4)
    assert found == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, -1]


def test_a_class_is_not_held_out_of_the_fold_that_leaves_it_out() -> None:
    found = folds_of([0] * 6, unrelated(6), [1])
    assert found == [0, 2, 3, 0, 2, 3]


def test_a_burst_is_held_out_as_one_and_the_others_balance_it() -> None:
    images = unrelated(9)
    for photo in (4, 7):  # with photo 2
        images[photo] = functional.normalize(images[2] + 0.02 * unrelated(1, seed=photo)[0], dim=0)
    found = folds_of([0] * 9, images, [-1])
    assert found[2] == found[4] == found[7] == 0
    rest = [fold for photo, fold in enumerate(found) if photo not in (2, 4, 7)]
    assert sorted(rest) == [1, 1, 2, 2, 3, 3]


def test_some_photo_of_every_class_is_tuned_on_in_every_fold() -> None:
    one = unrelated(1)
    burst = functional.normalize(one + 1e-4 * unrelated(5), dim=1)
    for images in (burst, torch.cat([burst[:4], unrelated(1, seed=1)]), one.expand(5, DIM)):
        found = folds_of([0] * 5, images, [-1])
        assert all(len({*found} - {fold}) >= 1 for fold in range(4))


def test_with_two_folds_a_part_of_every_left_out_class_is_never_held_out() -> None:
    found = folds_of([0] * 4, unrelated(4), [0], count=2)
    assert sorted(found) == [-1, -1, 1, 1]
