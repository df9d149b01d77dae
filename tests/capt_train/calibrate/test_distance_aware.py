"""The factors of DAC against a rewriting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from capt_train.calibrate.distance_aware import distance_aware_factors, tuned_texts


def closeness(text: Tensor, tuned: Tensor) -> float:
    """Return exp(−d) of the mean distance to the five nearest."""
    unit = [(own / own.norm()).tolist() for own in (text, *tuned)]
    apart = sorted(math.dist(unit[0], other) for other in unit[1:])[:5]
    return math.exp(-sum(apart) / len(apart))


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_factors_agree_with_the_formula_written_out(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, hand_written = torch.randn(2, 12, 6, generator=generator)
    tuned = torch.zeros(12, dtype=torch.bool)
    tuned[torch.randperm(12, generator=generator)[:count]] = True
    found = distance_aware_factors(rows, hand_written, tuned)
    for own in range(12):
        before, after = (closeness(part[own], part[tuned]) for part in (hand_written, rows))
        wanted = 1.0 if tuned[own] else after / before
        assert float(found[own]) == pytest.approx(wanted, rel=1e-5)


def test_what_tuning_has_not_moved_keeps_its_confidence() -> None:
    texts = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    tuned = torch.tensor([True] * 3 + [False] * 3)
    # longer rows are the mixture's business, not a distance
    assert distance_aware_factors(3 * texts, texts, tuned).tolist() == pytest.approx([1.0] * 6)


def test_where_nothing_or_everything_was_tuned_all_factors_are_1() -> None:
    rows, hand_written = torch.randn(2, 4, 5)
    for flag in (False, True):
        tuned = torch.full((4,), flag)
        assert distance_aware_factors(rows, hand_written, tuned).tolist() == [1.0] * 4


def test_classes_may_be_measured_to_others_than_these() -> None:
    rows, hand_written = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    tuned = torch.arange(9) < 6
    texts = tuned_texts(rows, hand_written, tuned)
    whole = distance_aware_factors(rows, hand_written, tuned)
    for chosen in ([8, 6], [7, 0, 8]):  # none of the classes tuned on, and one of them
        own = distance_aware_factors(rows[chosen], hand_written[chosen], tuned[chosen], texts)
        torch.testing.assert_close(own, whole[chosen])
