"""METHOD 5, semantic half: the equation by loops, its start, and what a step moves."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from capt_train.method.losses import balance
from capt_train.method.semantic_experts import SemanticExperts, cluster

TAU, RANK = 0.3, 2
TUNED = (1, 4, 5)  # of the classes 0 to 6


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def experts(
    dim: int = 6, dtype: torch.dtype = torch.float64, moved: bool = False
) -> SemanticExperts:
    generator = torch.Generator().manual_seed(4)
    centres = unit(2, len(TUNED), 3, dim, seed=9)
    own = SemanticExperts(centres, TUNED, TAU, RANK, generator).to(dtype)
    if moved:
        for parameter in own.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.5 * noise).to(dtype)
    return own


def by_hand(own: SemanticExperts, t: list[float], place: int) -> tuple[list[float], list[float]]:
    """t̃ and the gates of one tuned class."""
    dim = len(t)
    scores = []
    for row, bias in zip(own.router.weight.tolist(), own.router.bias.tolist(), strict=True):
        scores.append(sum(a * b for a, b in zip(row, t, strict=True)) + bias)
    powers = [0.0 if score == min(scores) else math.exp(score) for score in scores]
    gates = [power / sum(powers) for power in powers]
    moved = list(t)
    for e, centres in enumerate(own.centres[:, place].tolist()):
        down, up = own.down[e].tolist(), own.up[e].tolist()
        u = [
            [sum(down[i][r] * up[r][j] for r in range(RANK)) for j in range(dim)]
            for i in range(dim)
        ]
        w = [[float(i == j) + u[i][j] for j in range(dim)] for i in range(dim)]
        powers = [math.exp(sum(a * b for a, b in zip(t, m, strict=True)) / TAU) for m in centres]
        mixed = [
            sum(p * m[i] for p, m in zip(powers, centres, strict=True)) / sum(powers)
            for i in range(dim)
        ]
        for j in range(dim):
            answer = sum(mixed[i] * w[i][j] for i in range(dim))
            moved[j] += own.beta.item() * gates[e] * answer
    norm = math.sqrt(sum(value**2 for value in moved))
    return [value / norm for value in moved], gates


def test_it_equals_its_equation() -> None:
    own, texts = experts(moved=True), unit(3, 6)
    moved, gates = own(texts, [5, 1, 4])
    for place, row, found, gate in zip(
        (2, 0, 1), texts, moved.tolist(), gates.tolist(), strict=True
    ):
        expected, expected_gates = by_hand(own, row.tolist(), place)
        assert sum(value > 0 for value in gate) == 2
        assert found == pytest.approx(expected, rel=1e-12)
        assert gate == pytest.approx(expected_gates, rel=1e-12)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_experts_change_not_a_bit_and_all_are_used(dtype: torch.dtype) -> None:
    texts = unit(200, 64).to(dtype)
    moved, gates = experts(64, dtype)(texts, [1] * 200)
    assert torch.equal(moved, texts)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(200, dtype=dtype))
    assert ((gates > 0).sum(dim=1) == 2).all()
    assert ((gates > 0).sum(dim=0) > 50).all()  # of 200 classes


def test_a_class_depends_on_nothing_but_itself() -> None:
    own, texts = experts(moved=True), unit(3, 6)
    together, _ = own(texts, TUNED)
    alone = torch.cat([own(row[None], [c])[0] for row, c in zip(texts, TUNED, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_a_class_attends_to_its_own_sentences_alone() -> None:
    own, texts = experts(moved=True), unit(3, 6)
    before, _ = own(texts, TUNED)
    own.centres[:, 1] = unit(2, 3, 6, seed=30)  # other sentences of class 4
    after, _ = own(texts, TUNED)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


def test_classes_without_sentences_keep_their_embeddings() -> None:
    own, texts = experts(moved=True), unit(3, 6)
    own.centres[:, 1] = 0  # class 4 is in no mined pair
    moved, _ = own(texts, [0, 4, 6])
    torch.testing.assert_close(moved, texts, rtol=0, atol=1e-12)
    by_name, gates = own(texts, None)
    assert torch.equal(by_name, texts)
    assert gates is None


def test_gradients_are_right() -> None:
    own = experts(4, moved=True)
    names = [name for name, _ in own.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in own.parameters()]

    def call(texts: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(own, replaced, (texts, TUNED))

    assert gradcheck(call, (unit(3, 4).requires_grad_(), *values))


def stepped(own: SemanticExperts, steps: int) -> list[set[str]]:
    """Train towards other embeddings; return which parameters each step has moved."""
    texts, target = unit(3, 6), unit(3, 6, seed=1)
    optimizer = torch.optim.AdamW(own.parameters(), 0.01, weight_decay=0.0005)
    moved = []
    for _ in range(steps):
        before = {name: value.clone() for name, value in own.state_dict().items()}
        optimizer.zero_grad()
        (own(texts, TUNED)[0] - target).square().sum().backward()
        optimizer.step()
        after = own.state_dict()
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    return moved


def test_the_first_step_moves_beta_alone_and_the_centres_never_move() -> None:
    own = experts()
    for group in ("down", "router.weight"):  # without the decay of what starts at random
        own.get_parameter(group).data *= 0
    own.down.data += 0.1
    first, second = stepped(own, 2)
    assert first - {"down"} == {"beta"}
    assert second == {"beta", "down", "up", "router.weight", "router.bias"}


def test_balance_reaches_the_router_and_nothing_else() -> None:
    own = experts()
    own.router.bias.data += torch.tensor([1.0, 0.5, 0.0])
    balance(own(unit(3, 6), TUNED)[1]).backward()
    reached = {name for name, p in own.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"router.weight", "router.bias"}


def test_centres_are_saved_with_the_experts_but_not_trained() -> None:
    own = experts()
    assert torch.equal(own.state_dict()["centres"], unit(2, 3, 3, 6, seed=9))
    assert "centres" not in dict(own.named_parameters())
    centres = unit(2, 3, 3, 6)
    kept = centres.clone()
    SemanticExperts(centres, TUNED, TAU, RANK, torch.Generator()).centres.zero_()
    assert torch.equal(centres, kept)


def groups(seed: int) -> Tensor:
    """Sentences around four directions, of any length."""
    generator = torch.Generator().manual_seed(seed)
    middle = unit(4, 8, seed=20).repeat_interleave(6, dim=0)
    noise = 0.02 * torch.randn(24, 8, generator=generator, dtype=torch.float64)
    length = 0.1 + 3 * torch.rand(24, 1, generator=generator, dtype=torch.float64)
    return length * (middle + noise)


def test_clusters_are_the_unit_norm_middles_of_sentences_by_cosine() -> None:
    centres = cluster(groups(seed=0), 4, seed=1)
    assert centres.shape == (4, 8)
    assert centres.dtype == torch.float32
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(4))
    cosines = unit(4, 8, seed=20).float() @ centres.T
    assert (cosines.max(dim=1).values > 0.995).all()  # each group has a centre
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3]  # of its own


def test_clusters_depend_on_seed_and_sentences_but_not_on_their_order() -> None:
    spread = unit(40, 8, seed=1)
    centres = cluster(spread, 5, seed=1)
    assert torch.equal(centres, cluster(spread, 5, seed=1))
    assert torch.equal(centres, cluster(spread[torch.randperm(40)], 5, seed=1))
    assert not torch.equal(centres, cluster(spread, 5, seed=2))


@pytest.mark.parametrize("distinct", [1, 2])
def test_centres_repeat_where_there_are_fewer_distinct_sentences(distinct: int) -> None:
    sentences = unit(distinct, 8).repeat(6, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centres = cluster(sentences, 5, seed=1)
    assert centres.shape == (5, 8)
    assert len({tuple(row) for row in centres.tolist()}) == distinct
    nearest = (centres @ unit(distinct, 8).float().T).max(dim=1).values
    torch.testing.assert_close(nearest, torch.ones(5))
