"""A fitted map is a minimum of the loss, written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from capt_train.method.class_map import CLASSES, IMAGES, SIDES
from capt_train.tune.fit_map import MapTask, fit_map

DIM, COUNT, SCALE = 5, 4, 15.0


def task(**changes: object) -> MapTask:
    draw = torch.Generator().manual_seed(3)
    texts = functional.normalize(torch.randn(COUNT, DIM, generator=draw), dim=1)
    labels = torch.arange(24) % COUNT
    turned = texts @ torch.randn(DIM, DIM, generator=draw)
    noise = 0.3 * torch.randn(24, DIM, generator=draw)
    images = functional.normalize(functional.normalize(turned, dim=1)[labels] + noise, dim=1)
    values = {
        "scale": SCALE,
        "texts": texts[None],
        "images": images,
        "labels": labels,
        "mined": None,
        "reference": texts,
        "weights": {"cross_entropy": 1.0},
    }
    return MapTask(**{**values, **changes})  # type: ignore[arg-type]


def loss(given: MapTask, side: str, ridge: float, matrix: Tensor) -> Tensor:
    """Return the cross-entropy and the penalty in double precision, without the package."""
    images, texts = given.images.double(), given.texts[0].double()
    if side == IMAGES:
        moved = images + images @ matrix.T
        logits = given.scale * (moved / moved.norm(dim=1, keepdim=True)) @ texts.T
    else:
        moved = texts + texts @ matrix
        logits = given.scale * images @ (moved / moved.norm(dim=1, keepdim=True)).T
    right = logits.gather(1, given.labels[:, None]).squeeze(1)
    squared = ridge * (given.scale / 10) ** 2 * matrix.square().sum()
    return (logits.logsumexp(dim=1) - right).mean() + squared


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ridge", [0.1, 0.01])
def test_a_fitted_map_is_a_minimum(side: str, ridge: float) -> None:
    given = task()
    fitted = fit_map(given, side, ridge).double()

    def value_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = torch.from_numpy(flat.reshape(DIM, DIM)).requires_grad_()
        value = loss(given, side, ridge, matrix)
        (slope,) = torch.autograd.grad(value, matrix)
        return float(value), slope.numpy().ravel()

    best = minimize(value_and_slope, np.zeros(DIM * DIM), jac=True, method="BFGS").fun
    start = float(loss(given, side, ridge, torch.zeros(DIM, DIM, dtype=torch.double)))
    # the last few hundredths of the way are not worth their steps
    assert float(loss(given, side, ridge, fitted)) < best + 0.03 * (start - best)


def test_a_strong_ridge_leaves_everything_as_it_is() -> None:
    assert fit_map(task(), CLASSES, 1e6).abs().max() < 1e-4


def test_more_images_than_fit_at_once_give_the_same_map(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_map(task(), CLASSES, 0.03)
    monkeypatch.setattr("capt_train.tune.fit_map._AT_ONCE", 7)
    assert torch.allclose(fit_map(task(), CLASSES, 0.03), whole, atol=2e-3)


def test_the_confused_classes_of_each_image_join_the_contrast() -> None:
    mined = torch.stack([torch.arange(24) % COUNT, (torch.arange(24) + 1) % COUNT], dim=1)
    plain = fit_map(task(), CLASSES, 0.03)
    both = {"cross_entropy": 1.0, "infonce": 1.0}
    sharpened = fit_map(task(weights=both, mined=mined), CLASSES, 0.03)
    assert (sharpened - plain).abs().max() > 1e-3
