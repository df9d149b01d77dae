"""A fitted map is a minimum of the loss, written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from capt_train.method.class_map import CLASSES, IMAGES, SIDES
from capt_train.tune import fit_map as fit_map_module
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


def many(classes: int = 40) -> MapTask:
    draw = torch.Generator().manual_seed(5)
    texts = functional.normalize(torch.randn(classes, DIM, generator=draw), dim=1)
    labels = torch.arange(classes)
    images = functional.normalize(texts + 0.3 * torch.randn(classes, DIM, generator=draw), dim=1)
    mined = torch.stack([labels, (labels + 1) % classes], dim=1)
    return task(texts=texts[None], images=images, labels=labels, mined=mined, reference=texts)


def test_of_many_classes_own_and_mined_ones_stay_and_drawn_ones_stand_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit_map_module, "_DRAWN", 10)
    given, rows = many(), torch.tensor([3, 7])
    draw = torch.Generator().manual_seed(0)
    columns, offsets = fit_map_module._columns(given, rows, draw)
    assert columns.tolist() == sorted({*columns.tolist()}) and len(columns) == 14
    own = {3, 4, 7, 8}
    weights = dict(zip(columns.tolist(), offsets.exp().tolist(), strict=True))
    assert own <= weights.keys() and all(weights[column] == 1 for column in own)
    # the others sum up to all other classes
    assert sum(weights.values()) == pytest.approx(40)
    again, _ = fit_map_module._columns(given, rows, draw)
    assert again.tolist() != columns.tolist()
    step = fit_map_module._step(given, IMAGES, torch.zeros(DIM, DIM), rows, columns, offsets)
    assert columns[step.labels].tolist() == [3, 7]
    assert step.mined is not None and columns[step.mined].tolist() == [[3, 4], [7, 8]]
    exact = given.scale * given.images[rows] @ given.texts[0][columns].T
    torch.testing.assert_close(step.logits[0] - offsets, exact)


@pytest.mark.parametrize("side", SIDES)
def test_a_map_fitted_on_drawn_classes_is_nearly_as_good(
    monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    given, ridge = many(60), 0.003
    exact = fit_map(given, side, ridge)
    monkeypatch.setattr(fit_map_module, "_DRAWN", 20)
    monkeypatch.setattr(fit_map_module, "_AT_ONCE", 10)
    drawn = fit_map(given, side, ridge)
    start, best, near = (
        float(loss(given, side, ridge, matrix.double()))
        for matrix in (torch.zeros_like(exact), exact, drawn)
    )
    assert best < near < best + 0.5 * (start - best)  # 20 are few, and so is each image's class
