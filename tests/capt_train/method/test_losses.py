"""Every term against METHOD 6 written out again with loops and D×D matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import gradcheck

from capt_train.method import losses

Floats = NDArray[np.float64]
SCALE = 40.0  # of the logits


def noisy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of labels of which 30 % are wrong."""
    return losses.noisy_cross_entropy(logits, labels, 0.3)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    return losses.margin(logits, labels, SCALE)


BATCH_TERMS = [losses.cross_entropy, noisy, losses.confusion_aware, margin]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels_for(batch: int, classes: int) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(7))


def probability(row: Floats, label: int) -> float:
    return math.exp(row[label]) / sum(math.exp(value) for value in row)


def cross_entropy_by_hand(logits: Floats, labels: list[int]) -> float:
    pairs = zip(logits, labels, strict=True)
    return sum(-math.log(probability(row, own)) for row, own in pairs) / len(labels)


def noisy_by_hand(logits: Floats, labels: list[int]) -> float:
    """A label is drawn from the model's classes, and 30 % of them become any other one."""
    total, classes = 0.0, logits.shape[1]
    for row, own in zip(logits, labels, strict=True):
        chance = 0.0
        for drawn in range(classes):
            becomes = 0.7 if drawn == own else 0.3 / (classes - 1)
            chance += probability(row, drawn) * becomes
        total -= math.log(chance)
    return total / len(labels)


def confusion_aware_by_hand(logits: Floats, labels: list[int]) -> float:
    pairs = zip(logits, labels, strict=True)
    return sum(1 - probability(row, own) for row, own in pairs) / len(labels)


def margin_by_hand(logits: Floats, labels: list[int]) -> float:
    margins = [
        100 / SCALE * (row[own] - max(value for index, value in enumerate(row) if index != own))
        for row, own in zip(logits, labels, strict=True)
    ]
    mean = sum(margins) / len(margins)
    variance = sum((value - mean) ** 2 for value in margins) / len(margins)
    return float(-0.1 * mean + 0.01 * variance)


def moments_by_hand(embeddings: Floats, reference: Floats) -> float:
    def covariance(rows: Floats) -> Floats:
        return sum(np.outer(row - rows.mean(0), row - rows.mean(0)) for row in rows) / len(rows)

    shift = embeddings.mean(0) - reference.mean(0)
    spread = covariance(embeddings) - covariance(reference)
    return float((shift**2).sum() + (spread**2).sum())


@pytest.mark.parametrize(
    ("term", "by_hand"),
    [
        (losses.cross_entropy, cross_entropy_by_hand),
        (noisy, noisy_by_hand),
        (losses.confusion_aware, confusion_aware_by_hand),
        (margin, margin_by_hand),
    ],
)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (5, 2), (9, 6)])
def test_batch_terms_equal_their_equations(
    term: Callable[..., Tensor], by_hand: Callable[..., float], batch: int, classes: int
) -> None:
    logits, labels = random(batch, classes, scale=3), labels_for(batch, classes)
    expected = by_hand(logits.numpy(), labels.tolist())
    assert term(logits, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("classes", "dim"), [(3, 8), (8, 8), (9, 4), (1, 5)])
def test_moments_equal_the_full_covariance_matrices(classes: int, dim: int) -> None:
    own, reference = random(classes, dim), random(classes, dim, seed=1)
    expected = moments_by_hand(own.numpy(), reference.numpy())
    assert losses.moments(own, reference).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("classes", "dim"), [(3, 8), (9, 4)])
def test_moments_vanish_at_the_reference_but_not_for_a_rotated_or_shifted_one(
    classes: int, dim: int
) -> None:
    reference = random(classes, dim)
    assert losses.moments(reference, reference).item() == pytest.approx(0, abs=1e-12)
    assert losses.moments(reference + 0.1, reference).item() == pytest.approx(0.01 * dim)
    assert losses.moments(reference.flip(1), reference) > 0.01


@pytest.mark.parametrize("term", BATCH_TERMS)
def test_gradients_of_batch_terms_are_right(term: Callable[..., Tensor]) -> None:
    labels = labels_for(4, 5)
    logits = random(4, 5).requires_grad_()
    assert gradcheck(lambda values: term(values, labels), (logits,))


@pytest.mark.parametrize(("classes", "dim"), [(3, 6), (6, 3)])
def test_gradients_of_moments_are_right(classes: int, dim: int) -> None:
    reference = random(classes, dim, seed=1)
    own = random(classes, dim).requires_grad_()
    assert gradcheck(lambda values: losses.moments(values, reference), (own,))


def test_confusion_aware_gradient_is_largest_at_undecided_samples() -> None:
    gaps = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64)  # hopeless, confused, certain
    logits = torch.stack([gaps, torch.zeros(3)], dim=1).requires_grad_()
    losses.confusion_aware(logits, torch.zeros(3, dtype=torch.long)).backward()
    assert logits.grad is not None
    hopeless, confused, certain = logits.grad[:, 0].abs().tolist()
    assert confused > 100 * hopeless
    assert confused > 100 * certain


@pytest.mark.parametrize("scale", [1.0, 19.0, 28.0])
def test_the_margin_term_depends_on_cosines_not_on_the_scale_of_the_logits(scale: float) -> None:
    cosines, labels = 0.1 * random(9, 6), labels_for(9, 6)
    expected = losses.margin(100 * cosines, labels, 100.0)  # on CLIP, as its authors wrote it
    torch.testing.assert_close(losses.margin(scale * cosines, labels, scale), expected)


def test_labels_that_are_never_wrong_give_the_cross_entropy() -> None:
    logits, labels = random(5, 4, scale=3), labels_for(5, 4)
    assert torch.equal(
        losses.noisy_cross_entropy(logits, labels, 0.0), losses.cross_entropy(logits, labels)
    )
    # of the smallest share only hopeless labels would tell
    close = losses.noisy_cross_entropy(logits, labels, 1e-9)
    torch.testing.assert_close(close, losses.cross_entropy(logits, labels))


def test_likelihoods_of_all_labels_add_up_to_one() -> None:
    logits = random(3, 5, scale=3)
    columns = [losses.noisy_likelihood(logits, torch.full((3,), c), 0.3) for c in range(5)]
    assert torch.stack(columns).sum(dim=0).tolist() == pytest.approx([1.0] * 3)


def test_a_label_is_as_probably_right_as_bayes_says() -> None:
    logits, label = torch.tensor([[0.9, 0.05, 0.05]]).log(), torch.tensor([1])
    right = losses.right_probabilities(logits, label, share=0.2)
    # drawn and kept, 0.05·0.8; one of the others drawn and changed to it, 0.95·0.1
    assert right.item() == pytest.approx(0.04 / (0.04 + 0.095))
    assert losses.right_probabilities(logits, label, share=0.0).item() == pytest.approx(1.0)


def test_hopeless_labels_pull_less_the_more_labels_are_wrong() -> None:
    logits = torch.tensor([[-8.0, 0, 0], [0.0, 0, 0]], dtype=torch.float64).requires_grad_()
    pulls = []
    for share in (0.0, 0.01, 0.3):
        value = losses.noisy_cross_entropy(logits, torch.zeros(2, dtype=torch.long), share)
        (slope,) = torch.autograd.grad(value, logits)
        pulls.append((-slope[:, 0]).tolist())
    (hopeless, undecided), (less, _), (least, still) = pulls
    assert hopeless > 10 * less > 100 * least > 0
    assert undecided > still > undecided / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", BATCH_TERMS)
def test_half_precision_logits_give_float32_terms(
    term: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    logits, labels = (random(64, 10) * 30).to(dtype), labels_for(64, 10)
    value = term(logits, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(term(logits.double(), labels).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "dim"), [(5, 16), (16, 5)])
def test_half_precision_embeddings_give_a_float32_moment_term(
    classes: int, dim: int, dtype: torch.dtype
) -> None:
    own, reference = random(classes, dim).to(dtype), random(classes, dim, seed=1).to(dtype)
    value = losses.moments(own, reference)
    assert value.dtype == torch.float32
    expected = losses.moments(own.double(), reference.double()).item()
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", BATCH_TERMS)
def test_batch_terms_stay_finite_for_extreme_logits(term: Callable[..., Tensor]) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = term(logits, torch.tensor([0, 0]))
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("term", [*BATCH_TERMS, losses.moments])
@pytest.mark.parametrize(("rows", "columns"), [(6, 40), (40, 6)])
def test_autocast_changes_neither_terms_nor_gradients(
    term: Callable[..., Tensor], dtype: torch.dtype, rows: int, columns: int
) -> None:
    own = random(rows, columns, scale=3).float().requires_grad_()
    other = random(rows, columns, seed=1).float()
    if term is not losses.moments:
        other = labels_for(rows, columns)
    outside = term(own, other)
    (slope,) = torch.autograd.grad(outside, own)
    with torch.autocast("cpu", dtype):
        assert (own @ own.T).dtype == dtype  # so autocast is at work here
        inside = term(own, other)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(inside, own)[0], slope, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_noticed_under_test() -> None:
    with pytest.raises(TypeCheckError):
        losses.cross_entropy(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long))


def test_wrong_labels_are_spread_over_all_classes_where_columns_stand_for_several() -> None:
    logits, labels = torch.zeros(1, 4, dtype=torch.double), torch.tensor([2])
    found = losses.noisy_likelihood(logits, labels, 0.3, classes=11)
    assert found.item() == pytest.approx(0.7 * 0.25 + 0.3 * 0.75 / 10)
