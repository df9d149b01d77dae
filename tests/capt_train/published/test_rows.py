"""Rows of published methods, against their algorithms written out once more without autograd."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from capt_deploy.core.errors import RunError
from capt_train.config import default_losses
from capt_train.method.class_rows import ClassRows, RowPart, RowTask
from capt_train.published.clap import ConstrainedRows
from capt_train.published.class_means import ClassMeans
from capt_train.published.lp_plus_plus import BlendedRows
from capt_train.published.taskres import ResidualRows
from capt_train.published.tip_adapter import Cache, TunedCache
from capt_train.published.two_stages import LinearClassifier

CLASSES, DIM, SCALE = 3, 8, 20.0
WEIGHTS = dict.fromkeys(default_losses(), 0.0) | {"cross_entropy": 1.0}


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_task(shots: int = 6, val: int = 0, **weights: float) -> RowTask:
    """Return photos around a centre for each class, in float64 where it matters little."""
    centres, labels = unit(CLASSES, DIM, seed=0), torch.arange(CLASSES).repeat(shots)
    images = normalize(centres[labels] + 0.6 * unit(len(labels), DIM, seed=1), dim=-1)
    val_labels = torch.arange(CLASSES).repeat(val)
    val_images = normalize(centres[val_labels] + 0.6 * unit(len(val_labels), DIM, seed=2), dim=-1)
    texts = normalize(centres + 0.5 * unit(CLASSES, DIM, seed=3), dim=-1)
    return RowTask(
        images, labels, texts, texts, SCALE, {**WEIGHTS, **weights}, 1, val_images, val_labels
    )


def fitted(kind: type[RowPart], task: RowTask) -> RowPart:
    part = kind([0, 2, 3], DIM)
    part.fit(task)
    return part


def slope(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean cross-entropy by the logits."""
    probabilities = softmax(logits, axis=1)
    probabilities[range(len(labels)), labels] -= 1
    return probabilities / len(labels)


def test_class_means_are_means_of_unit_norm() -> None:
    task = make_task()
    for place in range(CLASSES):
        mean = task.images[task.labels == place].mean(dim=0)
        expected = mean / mean.norm()
        torch.testing.assert_close(fitted(ClassMeans, task).weight[place], expected)


def test_rows_take_the_place_of_class_embeddings_of_the_tuned_classes_alone() -> None:
    part = fitted(ClassMeans, make_task())
    texts = ClassRows.from_texts(unit(5, DIM, seed=9))
    found = part.applied(texts, [4, 2, 0, 1, 3], SCALE)
    places = {0: None, 1: 1, 2: 0, 3: None, 4: 2}
    for row, place in places.items():
        expected = texts.rows[row] if place is None else part.weight[place]
        assert torch.equal(found.rows[row], expected)


def test_lp_plus_plus_descends_with_the_rates_of_its_lipschitz_constants() -> None:
    task = make_task()
    images, labels, texts = (v.double().numpy() for v in (task.images, task.labels, task.texts))
    labels = labels.astype(int)
    count, shots = len(labels), 6
    weight = np.stack([images[labels == c].sum(axis=0) for c in range(CLASSES)])
    bias, momentum = np.zeros(CLASSES), [np.zeros_like(weight), np.zeros(CLASSES)]
    cosines = images @ texts.T
    start = np.mean([cosines[labels == c, c].sum() / shots for c in range(CLASSES)])
    alpha = np.full(CLASSES, 250 * start)
    rate = 4 * count / np.linalg.eigvalsh(images.T @ images)[-1]
    alpha_rate = count / (4 * (cosines**2).sum(axis=0).max())
    for number in range(300):
        g = slope(images @ weight.T + bias + alpha * cosines, labels)
        steps = [g.T @ images, g.sum(axis=0)]
        by_alpha = (g * cosines).sum(axis=0)
        momentum = [0.9 * m + s for m, s in zip(momentum, steps, strict=True)]
        weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
        if (number + 1) % 10 == 0:
            alpha = alpha - alpha_rate * by_alpha
    part = fitted(BlendedRows, task)
    logits = SCALE * task.images @ part.weight.T + part.bias
    expected = images @ (weight + alpha[:, None] * texts).T + bias
    assert np.allclose(logits.numpy(), expected, rtol=1e-2, atol=0.05 * np.abs(expected).max())
    assert (logits.numpy().argmax(1) == expected.argmax(1)).all()


def test_clap_holds_rows_near_class_embeddings_that_are_right() -> None:
    task = make_task()
    images, texts = task.images.double(), task.texts.double()
    right = torch.stack([(SCALE * x @ texts.T).softmax(0) for x in images])
    multipliers = torch.stack([right[task.labels == c, c].mean() for c in range(CLASSES)])
    rows = texts.clone()
    speed = torch.zeros_like(rows)
    for number in range(300):  # one batch an epoch
        rate = 1e-5 if number < 1 else 0.05 * (1 + math.cos(math.pi * (number - 1) / 299))
        norms = rows.norm(dim=1, keepdim=True)
        units = rows / norms
        logits = SCALE * images @ units.T
        g = torch.from_numpy(slope(logits.numpy(), task.labels.numpy()))
        by_unit = SCALE * g.T @ images
        by_row = (by_unit - (by_unit * units).sum(1, keepdim=True) * units) / norms
        by_row = by_row + 2 * multipliers[:, None] * (rows - texts) / CLASSES + 5e-4 * rows
        speed = 0.9 * speed + by_row
        rows = rows - rate * speed
    found = fitted(ConstrainedRows, task).weight
    torch.testing.assert_close(found.double(), normalize(rows, dim=1), atol=1e-3, rtol=0)


def test_the_classifier_of_2sfs_starts_from_the_class_embeddings_and_lowers_the_loss() -> None:
    task = make_task()
    part = fitted(LinearClassifier, task)

    def loss(rows: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(SCALE * task.images @ rows.T, task.labels))

    assert loss(part.weight) < 0.95 * loss(task.texts)
    assert (part.weight - task.texts).norm() < 0.5 * task.texts.norm()  # 720 small steps


def test_taskres_descends_along_the_residual_alone() -> None:
    task = make_task()
    images, texts = task.images.double(), task.texts.double()
    residual = torch.zeros_like(texts)
    first, second = torch.zeros_like(texts), torch.zeros_like(texts)
    for number in range(100):  # one batch an epoch
        rate = 1e-5 if number < 1 else 0.001 * (1 + math.cos(math.pi * (number - 1) / 99))
        moved = texts + 0.5 * residual
        norms = moved.norm(dim=1, keepdim=True)
        units = moved / norms
        g = torch.from_numpy(slope((SCALE * images @ units.T).numpy(), task.labels.numpy()))
        by_unit = SCALE * g.T @ images
        gradient = 0.5 * (by_unit - (by_unit * units).sum(1, keepdim=True) * units) / norms
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        slope_sizes = (second / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
        residual = residual - rate * first / (1 - 0.9 ** (number + 1)) / slope_sizes
    expected = normalize(texts + 0.5 * residual, dim=1)
    found = fitted(ResidualRows, task).weight.double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("val", [0, 4])
def test_tip_adapter_adds_the_answers_of_similar_photos(val: int) -> None:
    task = make_task(val=val)
    part = fitted(Cache, task)
    alpha, beta = 1.0, 5.5
    if val:
        values = [(number + 1) / 20 for number in range(20)]
        best = -1.0
        for a, b in product([3 * v for v in values], [7 * v for v in values]):
            sums = (
                torch.exp(-b * (1 - task.val_images @ task.images.T)) @ one_hot(task.labels).float()
            )
            logits = SCALE * task.val_images @ task.texts.T + a * sums
            right = float((logits.argmax(1) == task.val_labels).double().mean())
            if right > best:
                best, alpha, beta = right, a, b
    torch.testing.assert_close(part.strength, torch.tensor([alpha, beta]))
    image = unit(1, DIM, seed=7)
    added = part.added(image, [1, 3, 0], SCALE)
    expected = [0.0, 0.0, 0.0]
    for photo, label in zip(task.images, task.labels.tolist(), strict=True):
        place = {0: 2, 2: 1}.get(label)  # class 3 of the run, then class 0
        if place is not None:
            expected[place] += alpha * math.exp(-beta * (1 - float(image[0] @ photo)))
    torch.testing.assert_close(added[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_tuned_keys_lower_the_loss_and_are_kept() -> None:
    task = make_task()
    before, after = fitted(Cache, task), fitted(TunedCache, task)
    assert not torch.allclose(before.keys, after.keys, atol=1e-3)

    def loss(part: RowPart) -> float:
        logits = SCALE * task.images @ task.texts.T + part.added(task.images, [0, 2, 3], SCALE)
        return float(torch.nn.functional.cross_entropy(logits, task.labels))

    assert loss(after) < loss(before)
    again = TunedCache([0, 2, 3], DIM)
    again.load_state_dict(after.state_dict())
    assert torch.equal(again.keys, after.keys) and torch.equal(again.values, after.values)


@pytest.mark.parametrize("kind", [ConstrainedRows, LinearClassifier, BlendedRows])
def test_the_terms_of_tcpt_reach_rows(kind: type[RowPart]) -> None:
    plain = fitted(kind, make_task())
    with_terms = fitted(kind, make_task(moments=5.0))
    assert not torch.allclose(plain.weight, with_terms.weight, atol=1e-4)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    task = make_task()
    task.images[0, 0] = float("nan")
    for kind in (ConstrainedRows, BlendedRows):
        with pytest.raises((RunError, RuntimeError), match=r"loss became nan|converge|eigenvalues"):
            fitted(kind, task)
