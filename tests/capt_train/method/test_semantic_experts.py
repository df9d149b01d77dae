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

TAU = 0.3


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def experts(
    dim: int = 6, dtype: torch.dtype = torch.float64, moved: bool = False
) -> SemanticExperts:
    own = SemanticExperts(unit(2, 3, dim, seed=9), TAU).to(dtype)
    if moved:
        generator = torch.Generator().manual_seed(4)
        for parameter in own.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.5 * noise).to(dtype)
    return own


def by_hand(own: SemanticExperts, t: list[float]) -> tuple[list[float], list[float]]:
    """t̃ and the gates of one class."""
    dim = len(t)
    scores = []
    for row, bias in zip(own.router.weight.tolist(), own.router.bias.tolist(), strict=True):
        scores.append(sum(a * b for a, b in zip(row, t, strict=True)) + bias)
    gates = [math.exp(score) / sum(math.exp(s) for s in scores) for score in scores]
    moved = list(t)
    for e, centres in enumerate(own.centres.tolist()):
        u = own.update[e].tolist()
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
    own, texts = experts(moved=True), unit(5, 6)
    moved, gates = own(texts)
    for row, found, gate in zip(texts, moved.tolist(), gates.tolist(), strict=True):
        expected, expected_gates = by_hand(own, row.tolist())
        assert found == pytest.approx(expected, rel=1e-12)
        assert gate == pytest.approx(expected_gates, rel=1e-12)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_experts_change_not_a_bit_and_share_alike(dtype: torch.dtype) -> None:
    texts = unit(200, 64).to(dtype)
    moved, gates = experts(64, dtype)(texts)
    assert torch.equal(moved, texts)
    assert (gates == 0.5).all()


def test_a_class_depends_on_nothing_but_itself() -> None:
    own, texts = experts(moved=True), unit(5, 6)
    together, _ = own(texts)
    alone = torch.cat([own(row[None])[0] for row in texts])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_gradients_are_right() -> None:
    own = experts(4, moved=True)
    names = [name for name, _ in own.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in own.parameters()]

    def call(texts: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(own, replaced, (texts,))

    assert gradcheck(call, (unit(3, 4).requires_grad_(), *values))


def stepped(own: SemanticExperts, steps: int) -> list[set[str]]:
    """Train towards other embeddings; return which parameters each step has moved."""
    texts, wanted = unit(5, 6), unit(5, 6, seed=1)
    optimizer = torch.optim.AdamW(own.parameters(), 0.01, weight_decay=0.0005)
    moved = []
    for _ in range(steps):
        before = {name: value.clone() for name, value in own.state_dict().items()}
        optimizer.zero_grad()
        (own(texts)[0] - wanted).square().sum().backward()
        optimizer.step()
        after = own.state_dict()
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    return moved


def test_the_first_step_moves_beta_alone_the_second_all_but_the_centres() -> None:
    first, second = stepped(experts(), 2)
    assert first == {"beta"}
    assert second == {"beta", "update", "router.weight", "router.bias"}


def test_balance_reaches_the_router_and_nothing_else() -> None:
    own = experts()
    own.router.bias.data += torch.tensor([1.0, 0.0])
    balance(own(unit(5, 6))[1]).backward()
    reached = {name for name, p in own.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"router.weight", "router.bias"}


def test_centres_are_saved_with_the_experts_but_not_trained() -> None:
    own = experts()
    assert torch.equal(own.state_dict()["centres"], unit(2, 3, 6, seed=9))
    assert "centres" not in dict(own.named_parameters())
    centres = unit(2, 3, 6)
    kept = centres.clone()
    SemanticExperts(centres, TAU).centres.zero_()
    assert torch.equal(centres, kept)


def groups(kinds: int, seed: int) -> list[Tensor]:
    """Sentences around four directions that differ between the kinds, of any length."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for kind in range(kinds):
        middle = unit(4, 8, seed=20 + kind).repeat_interleave(6, dim=0)
        noise = 0.02 * torch.randn(24, 8, generator=generator, dtype=torch.float64)
        length = 0.1 + 3 * torch.rand(24, 1, generator=generator, dtype=torch.float64)
        found.append(length * (middle + noise))
    return found


def test_clusters_are_the_unit_norm_middles_of_sentences_by_cosine() -> None:
    centres = cluster(groups(2, seed=0), 4, seed=1)
    assert centres.shape == (2, 4, 8)
    assert centres.dtype == torch.float32
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(2, 4))
    for kind in range(2):
        cosines = unit(4, 8, seed=20 + kind).float() @ centres[kind].T
        assert (cosines.max(dim=1).values > 0.995).all()  # each group has a centre
        assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3]  # of its own


def test_clusters_depend_on_seed_and_sentences_but_not_on_their_order() -> None:
    spread = [unit(40, 8, seed=seed) for seed in (1, 2)]
    one = cluster(spread, 5, seed=1)
    assert torch.equal(one, cluster(spread, 5, seed=1))
    shuffled = [own[torch.randperm(40)] for own in spread]
    assert torch.equal(one, cluster(shuffled, 5, seed=1))
    assert not torch.equal(one, cluster(spread, 5, seed=2))


@pytest.mark.parametrize("distinct", [1, 2])
def test_centres_repeat_where_there_are_fewer_distinct_sentences(distinct: int) -> None:
    sentences = unit(distinct, 8).repeat(6, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centres = cluster([sentences, unit(9, 8)], 5, seed=1)
    assert centres.shape == (2, 5, 8)
    assert len({tuple(row) for row in centres[0].tolist()}) == distinct
    nearest = (centres[0] @ unit(distinct, 8).float().T).max(dim=1).values
    torch.testing.assert_close(nearest, torch.ones(5))
