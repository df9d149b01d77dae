"""Which terms a step has, and what they are weighed into."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from capt_train import parts
from capt_train.method import loss_terms, losses
from capt_train.method.loss_terms import Retrieved, Step, weighted_sum

PUBLISHED = {name for part in parts.PUBLISHED.values() for name in part.losses}
ALL = dict.fromkeys((name for name in parts.loss_terms() if name not in PUBLISHED), 1.0)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(prompts: int = 3) -> Step:
    """A step with everything in it."""
    return Step(
        logits=random(prompts, 6, 4, seed=0),
        labels=torch.tensor([0, 1, 2, 3, 0, 1]),
        texts=normalize(random(prompts, 4, 8, seed=1), dim=-1),
        reference=normalize(random(4, 8, seed=2), dim=-1),
        scale=25.0,
        mined=torch.tensor([[1, 2]] * 6),
        images=normalize(random(6, 8, seed=3), dim=-1),
        frozen=normalize(random(6, 8, seed=4), dim=-1),
        gates=(random(6, 2, seed=5).softmax(dim=1), random(12, 2, seed=6).softmax(dim=1)),
    )


def test_every_term_has_a_weight_and_every_weight_a_term() -> None:
    assert {*loss_terms.loss_terms(whole(), ALL)} == {*ALL}


@pytest.mark.parametrize("prompts", [1, 3])
def test_terms_are_unweighted_means_over_the_prompts(prompts: int) -> None:
    step = whole(prompts)
    assert step.mined is not None
    assert step.images is not None
    assert step.frozen is not None
    found = loss_terms.loss_terms(step, dict.fromkeys(ALL, 7.0))
    for name, term in (
        ("cross_entropy", losses.cross_entropy),
        ("coa", losses.confusion_aware),
        ("margin", lambda z, y: losses.margin(z, y, 25.0)),
    ):
        own = [float(term(logits, step.labels)) for logits in step.logits]
        assert float(found[name]) == pytest.approx(sum(own) / prompts, rel=1e-5)
    own = [
        float(losses.confusion_infonce(logits, step.labels, step.mined)) for logits in step.logits
    ]
    assert float(found["infonce"]) == pytest.approx(sum(own) / prompts, rel=1e-5)
    own = [float(losses.moments(rows, step.reference)) for rows in step.texts]
    assert float(found["moments"]) == pytest.approx(sum(own) / prompts, rel=1e-5)
    assert found["consistency"] == losses.consistency(step.images, step.frozen)
    both = [float(losses.balance(gates)) for gates in step.gates]  # a sum, not a mean: METHOD 6
    assert float(found["balance"]) == pytest.approx(sum(both), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"mined": None}, {"infonce"}),
        ({"images": None}, {"consistency"}),
        ({"frozen": None}, {"consistency"}),
        ({"gates": ()}, {"balance"}),
    ],
)
def test_a_term_without_its_tensors_is_left_out(changes: dict[str, None], gone: set[str]) -> None:
    assert {*loss_terms.loss_terms(replace(whole(), **changes), ALL)} == {*ALL} - gone


@pytest.mark.parametrize("name", [*ALL])
def test_a_term_of_weight_0_or_none_is_not_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Step) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(loss_terms, name, never)
    for weights in ({**ALL, name: 0.0}, {key: 1.0 for key in ALL if key != name}):
        assert {*loss_terms.loss_terms(whole(), weights)} == {*ALL} - {name}


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_retrieved_samples_are_in_the_contrast_and_in_no_other_term(share: float) -> None:
    step = replace(whole(), label_noise=share)
    assert step.mined is not None
    retrieved = Retrieved(random(3, 2, 4, seed=7), torch.tensor([3, 1]), torch.tensor([[0, 2]] * 2))
    alone = loss_terms.loss_terms(step, ALL)
    together = loss_terms.loss_terms(replace(step, retrieved=retrieved), ALL)
    for name in ALL:
        assert torch.equal(alone[name], together[name]) == (name != "infonce")
    labels, mined = (
        torch.tensor([0, 1, 2, 3, 0, 1, 3, 1]),
        torch.tensor([[1, 2]] * 6 + [[0, 2]] * 2),
    )
    values = []
    for few, more in zip(step.logits, retrieved.logits, strict=True):
        z = torch.cat([few, more])
        weights = losses.right_probabilities(z, labels, share)
        values.append(losses.confusion_infonce(z, labels, mined, weights))
    torch.testing.assert_close(together["infonce"], torch.stack(values).mean())


def test_the_sum_is_weighted_by_name() -> None:
    weights = {name: float(2**power) for power, name in enumerate(ALL)}
    terms = loss_terms.loss_terms(whole(), weights)
    expected = sum(weights[name] * float(value) for name, value in terms.items())
    assert float(weighted_sum(terms, weights)) == pytest.approx(expected, rel=1e-5)
    own = {name: terms[name] for name in ("margin", "coa")}
    expected = weights["margin"] * float(terms["margin"]) + weights["coa"] * float(terms["coa"])
    assert float(weighted_sum(own, weights)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_and_infonce_mind_wrong_labels() -> None:
    step = whole()
    assert step.mined is not None
    right = loss_terms.loss_terms(step, ALL)
    noisy = loss_terms.loss_terms(replace(step, label_noise=0.2), ALL)
    minding = {"cross_entropy", "infonce"}
    for name in ALL:
        assert torch.equal(right[name], noisy[name]) == (name not in minding)
    own = [losses.noisy_cross_entropy(z, step.labels, 0.2) for z in step.logits]
    torch.testing.assert_close(noisy["cross_entropy"], torch.stack(own).mean())
    own = []
    for z in step.logits:
        weights = losses.right_probabilities(z, step.labels, 0.2)
        own.append(losses.confusion_infonce(z, step.labels, step.mined, weights))
    torch.testing.assert_close(noisy["infonce"], torch.stack(own).mean())
