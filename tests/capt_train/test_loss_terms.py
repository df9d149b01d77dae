from __future__ import annotations

from dataclasses import fields

import torch

from capt_train import losses, tuning
from capt_train.config import LossWeights
from capt_train.tuning import loss_terms, weighted_sum


def test_every_weight_has_a_term_and_every_term_a_weight() -> None:
    assert list(tuning._TERMS) == [field.name for field in fields(LossWeights)]


def test_terms_are_unweighted_and_weighted_only_in_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    own, reference = torch.randn(2, 4, 8, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    weights = LossWeights(cross_entropy=2.0, coa=3.0, margin=0.5, moments=0.25)
    terms = loss_terms(logits, labels, own, reference, weights)
    expected = {
        "cross_entropy": losses.cross_entropy(logits, labels),
        "coa": losses.confusion_aware(logits, labels),
        "margin": losses.margin(logits, labels),
        "moments": losses.moments(own, reference),
    }
    assert terms == expected
    total = 2 * terms["cross_entropy"] + 3 * terms["coa"]
    total = total + 0.5 * terms["margin"] + 0.25 * terms["moments"]
    torch.testing.assert_close(weighted_sum(terms, weights), total)


def test_terms_of_weight_0_are_not_computed() -> None:
    nowhere = torch.full((4, 8), float("nan"))
    weights = LossWeights(coa=0.0, margin=0.0, moments=0.0)
    terms = loss_terms(torch.zeros(2, 4), torch.tensor([0, 1]), nowhere, nowhere, weights)
    assert list(terms) == ["cross_entropy"]
    assert torch.isfinite(weighted_sum(terms, weights))
