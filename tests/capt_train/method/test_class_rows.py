"""Closed-form rows against densities written out again; maps start as the identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from capt_train.method.class_map import ClassMap
from capt_train.method.class_rows import (
    ClassRows,
    GaussianRows,
    Outside,
    RowTask,
    discriminant,
    joined,
)

DIM = 6


def photos(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    centres = torch.randn(len(counts), DIM, generator=draw)
    noise = 0.4 * torch.randn(len(labels), DIM, generator=draw)
    return functional.normalize(centres[labels] + noise, dim=1), labels


def log_density(image: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    difference = image - mean
    square = difference @ np.linalg.inv(covariance) @ difference
    return float(-0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1]))


@pytest.mark.parametrize("counts", [[8, 8, 8], [2, 9, 5, 1], [1, 1, 1]])
def test_a_row_is_the_log_likelihood_ratio_of_two_gaussians(counts: list[int]) -> None:
    images, labels = photos(counts)
    exact, classes = images.double().numpy(), len(counts)
    groups = [exact[labels.numpy() == label] for label in range(classes)]
    means = np.stack([group.mean(axis=0) for group in groups])
    centre = means.mean(axis=0)
    spare = len(exact) - classes
    within = np.concatenate([group - group.mean(axis=0) for group in groups])
    apart = (exact - centre).T @ (exact - centre) / (2 * len(exact))
    covariance = (within.T @ within + apart) / (spare + 1)
    variance = np.trace(covariance)
    # (N − C)·Σ + tr(Σ)·I, in the scale of Σ
    weights = np.array([max(spare, 1), DIM]) / (max(spare, 1) + DIM)
    shrunken = weights[0] * covariance + weights[1] * variance / DIM * np.eye(DIM)
    spread = ((means - centre) ** 2).sum() / (classes - 1)
    between = max(spread - variance * np.mean([1 / n for n in counts]), 0.05 * spread)
    trust = np.array([n / (n + variance / between) for n in counts])
    means = centre + trust[:, None] * (means - centre)
    fitted = discriminant(images, labels, classes)
    values = images @ fitted.weight.T + fitted.bias
    for row, image in enumerate(exact):
        background = log_density(image, centre, shrunken)
        for label in range(classes):
            expected = log_density(image, means[label], shrunken) - background
            assert float(values[row, label]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("change", [0.0, 1e-4])
def test_a_copy_of_the_only_photo_of_a_class_changes_little(change: float) -> None:
    images, labels = photos([1] * 6)
    copied = torch.cat([images, functional.normalize(images[:1] + change, dim=1)])
    before = discriminant(images, labels, 6)
    after = discriminant(copied, torch.cat([labels, labels[:1]]), 6)
    spreads = [(images @ fit.weight.T + fit.bias).std() for fit in (before, after)]
    assert 0.3 < spreads[1] / spreads[0] < 4


def test_copies_of_one_photo_are_no_error() -> None:
    images, labels = photos([2, 2])
    fitted = discriminant(images[:1].repeat(4, 1), labels, 2)
    assert fitted.weight.isfinite().all() and fitted.bias.isfinite().all()


def test_rows_tell_the_classes_of_their_photos_apart() -> None:
    images, labels = photos([8, 8, 8, 8])
    others, targets = photos([8, 8, 8, 8])
    fitted = discriminant(images, labels, 4)
    assert ((others @ fitted.weight.T + fitted.bias).argmax(dim=1) == targets).float().mean() > 0.9


def test_rows_are_added_to_the_tuned_classes_alone() -> None:
    images, labels = photos([5, 5])
    rows = GaussianRows([1, 3], DIM, share=0.5)
    texts = functional.normalize(torch.randn(4, DIM), dim=1)
    scale = 20.0
    none = images[:0], labels[:0]
    rows.fit(RowTask(images, labels, texts[:2], texts[:2], scale, {}, 1, *none))
    combined = rows.applied(ClassRows.from_texts(texts), [3, 0, 1, 2], scale)
    plain = scale * images @ texts.T
    added = 0.5 * (images @ rows.weight.T + rows.bias)
    expected = plain + torch.stack([added[:, 1], 0 * added[:, 0], added[:, 0], 0 * added[:, 0]], 1)
    assert torch.allclose(combined.logits(images, scale), expected, atol=1e-4)
    assert torch.equal(joined(combined, combined).biases, combined.biases.repeat(2))


def test_classes_without_photos_are_spread_about_the_tuned_ones() -> None:
    rows = ClassRows(torch.randn(5, DIM), torch.randn(5))
    tuned = [True, False, True, False, True]
    moved = Outside(scale=1.7, offset=0.3).applied(rows, tuned)
    centre = rows.rows[[0, 2, 4]].mean(dim=0)
    for place, known in enumerate(tuned):
        expected = rows.rows[place] if known else centre + 1.7 * (rows.rows[place] - centre)
        assert torch.allclose(moved.rows[place], expected, atol=1e-6)
        shift = 0.3 if known else 0.0
        assert float(rows.biases[place] - moved.biases[place]) == pytest.approx(shift, abs=1e-6)
    # among themselves, classes without photos only become surer
    images = torch.randn(7, DIM)
    before, after = (images @ part.rows[[1, 3]].T for part in (rows, moved))
    differences = [part[:, 0] - part[:, 1] for part in (before, after)]
    assert torch.allclose(1.7 * differences[0], differences[1], atol=1e-5)


def test_a_map_starts_as_the_identity_and_keeps_the_norm() -> None:
    made = ClassMap(DIM)
    texts = functional.normalize(torch.randn(2, 4, DIM), dim=-1)
    assert torch.allclose(made(texts)[0], texts, atol=1e-6)
    made.matrix.data = torch.randn(DIM, DIM)
    expected = texts @ (torch.eye(DIM) + made.matrix)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert torch.allclose(made(texts)[0], expected, atol=1e-5)
