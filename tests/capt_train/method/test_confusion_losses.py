"""The terms on confused classes, images and experts, each written out again with loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from capt_train.method import losses


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def infonce_by_hand(
    z: list[list[float]],
    labels: list[int],
    mined: list[list[int]],
    weights: list[float] | None = None,
) -> float:
    """Both directions for each image: its confused classes, and the images confused with it."""
    total = 0.0
    for b, y in enumerate(labels):
        weight = 1.0 if weights is None else weights[b]
        confused = {y, *mined[b]}
        among_classes = sum(math.exp(z[b][c]) for c in confused)
        among_images = math.exp(z[b][y])
        for a, other in enumerate(labels):
            if other != y and other in confused:
                among_images += math.exp(z[a][y])
        total -= weight * math.log(math.exp(z[b][y]) / among_classes)
        total -= weight * math.log(math.exp(z[b][y]) / among_images)
    return total / (2 * len(labels))


def balance_by_hand(gates: list[list[float]]) -> float:
    importance = [sum(column) for column in zip(*gates, strict=True)]
    mean = sum(importance) / len(importance)
    return sum((value - mean) ** 2 for value in importance) / len(importance) / mean**2


@pytest.mark.parametrize(
    ("batch", "classes", "pairs"), [(1, 2, 1), (6, 3, 1), (7, 5, 2), (9, 6, 4), (12, 4, 4)]
)
def test_infonce_equals_its_equation(batch: int, classes: int, pairs: int) -> None:
    for seed in range(4):
        logits = random(batch, classes, seed=seed, scale=2)
        labels = integers(classes, batch, seed=seed)
        mined = integers(classes, batch, pairs, seed=seed + 1)  # also y itself, and some twice
        expected = infonce_by_hand(logits.tolist(), labels.tolist(), mined.tolist())
        found = losses.confusion_infonce(logits, labels, mined)
        assert found.item() == pytest.approx(expected, rel=1e-12)
        weights = random(batch, seed=seed).sigmoid()
        args = (logits.tolist(), labels.tolist(), mined.tolist(), weights.tolist())
        found = losses.confusion_infonce(logits, labels, mined, weights)
        assert found.item() == pytest.approx(infonce_by_hand(*args), rel=1e-12)


def test_infonce_of_one_image_and_all_classes_is_half_its_cross_entropy() -> None:
    logits, labels = random(1, 4), torch.tensor([2])
    found = losses.confusion_infonce(logits, labels, torch.arange(4)[None])
    torch.testing.assert_close(found, losses.cross_entropy(logits, labels) / 2)


def test_infonce_leaves_classes_alone_that_are_not_confused() -> None:
    logits = random(2, 5).requires_grad_()
    labels, mined = torch.tensor([0, 1]), torch.tensor([[2], [1]])
    losses.confusion_infonce(logits, labels, mined).backward()
    assert logits.grad is not None
    # Image 1 is confused with nothing, and class 1 is mined for nobody else.
    assert (logits.grad != 0).tolist() == [[True, False, True, False, False], [False] * 5]


def test_other_images_of_the_same_class_are_not_pushed_away() -> None:
    logits = torch.tensor([[0.0, 1.0], [9.0, 1.0], [9.0, 1.0]], dtype=torch.float64)
    own = losses.confusion_infonce(logits, torch.tensor([0, 0, 0]), torch.tensor([[1]] * 3))
    own_classes = -logits.log_softmax(dim=1)[:, 0].mean() / 2
    torch.testing.assert_close(own, own_classes)


def test_consistency_is_the_mean_of_one_minus_the_cosine() -> None:
    one, other = normalize(random(7, 5), dim=1), normalize(random(7, 5, seed=1), dim=1)
    cosines = [
        sum(a * b for a, b in zip(f, g, strict=True))
        for f, g in zip(one.tolist(), other.tolist(), strict=True)
    ]
    expected = sum(1 - cosine for cosine in cosines) / 7
    assert losses.consistency(one, other).item() == pytest.approx(expected, rel=1e-12)
    assert losses.consistency(one, one).item() == pytest.approx(0, abs=1e-12)
    assert losses.consistency(one, -one).item() == pytest.approx(2)


@pytest.mark.parametrize(("batch", "experts"), [(1, 2), (8, 2), (5, 4)])
def test_balance_equals_its_equation(batch: int, experts: int) -> None:
    gates = random(batch, experts, scale=2).softmax(dim=1)
    expected = balance_by_hand(gates.tolist())
    assert losses.balance(gates).item() == pytest.approx(expected, rel=1e-12)


def test_balance_is_0_where_all_are_used_alike_and_largest_where_one_does_it_all() -> None:
    assert losses.balance(torch.full((6, 4), 0.25)) == 0
    # Alike over the batch is enough: each image may have an expert of its own.
    assert losses.balance(torch.eye(3)) == 0
    alone = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1)
    assert losses.balance(alone).item() == pytest.approx(2)


def test_the_gradient_of_balance_reaches_the_router_and_evens_it_out() -> None:
    weight, tokens = random(2, 3).requires_grad_(), random(8, 3, seed=1) + 1
    values, slopes = [], []
    for _ in range(40):
        loss = losses.balance((tokens @ weight.T).softmax(dim=1))
        (slope,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.2 * slope).detach().requires_grad_()
        values.append(loss.item())
        slopes.append(slope.abs().min().item())
    assert slopes[0] > 0
    assert values[-1] < 0.1 * values[0]


def test_gradients_are_right() -> None:
    labels, mined = integers(4, 5), integers(4, 5, 2, seed=1)
    logits = random(5, 4).requires_grad_()
    assert gradcheck(lambda z: losses.confusion_infonce(z, labels, mined), (logits,))
    one, other = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    assert gradcheck(losses.consistency, (one, other))
    gates = random(5, 3).softmax(dim=1).requires_grad_()
    assert gradcheck(losses.balance, (gates,))


HALF = [torch.float16, torch.bfloat16]


def infonce(logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    return losses.confusion_infonce(
        logits, integers(classes, batch), integers(classes, batch, 3, seed=1)
    )


def consistency(rows: Tensor) -> Tensor:
    return losses.consistency(rows, rows.flip(0))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("term", [infonce, consistency, losses.balance])
def test_half_precision_gives_float32_terms(
    term: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    # A sum over that many rows of gates is too coarse in half precision.
    values = (20 * random(600, 4).abs() / 100).to(dtype)
    found = term(values)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(term(values.double()).item(), rel=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("term", [infonce, consistency, losses.balance])
def test_autocast_changes_neither_terms_nor_gradients(
    term: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    values = random(40, 6).abs().float().requires_grad_()
    outside = term(values)
    with torch.autocast("cpu", dtype):
        inside = term(values)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(value, values)[0] for value in (inside, outside)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-6)


def test_infonce_stays_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = losses.confusion_infonce(logits, torch.tensor([1, 0]), torch.tensor([[0], [1]]))
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_shapes_that_do_not_fit_are_noticed_under_test() -> None:
    with pytest.raises(TypeCheckError):
        losses.confusion_infonce(torch.zeros(3, 2), integers(2, 3), integers(2, 4, 1))
    with pytest.raises(TypeCheckError):
        losses.consistency(torch.zeros(3, 2), torch.zeros(3, 4))
