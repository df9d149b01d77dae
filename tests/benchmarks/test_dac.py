"""What docs/export.md says of DAC is what was measured; the factors against a rewriting."""

import math

import pytest
import torch

from benchmarks import dac
from benchmarks.record import load_cells


def test_the_factors_agree_with_the_formula_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, zero_shot = torch.randn(2, 7, 5, generator=generator)
    tuned = torch.tensor([True, False, True, True, False, True, False])
    found = dac.distance_aware_factors(rows, zero_shot, tuned, neighbours=2)

    def closeness(texts: torch.Tensor, own: int) -> float:
        unit = [(text / text.norm()).tolist() for text in texts]
        apart = sorted(math.dist(unit[own], unit[other]) for other in range(7) if tuned[other])
        return math.exp(-sum(apart[:2]) / 2)

    for own in range(7):
        wanted = 1.0 if tuned[own] else closeness(rows, own) / closeness(zero_shot, own)
        assert float(found[own]) == pytest.approx(wanted, rel=1e-5)


def test_what_tuning_has_not_moved_keeps_its_confidence() -> None:
    texts = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    tuned = torch.tensor([True] * 3 + [False] * 3)
    # longer rows are the mixture's business, not a distance
    assert dac.distance_aware_factors(3 * texts, texts, tuned).tolist() == pytest.approx([1.0] * 6)


def test_the_docs_show_what_was_measured() -> None:
    cells = load_cells(dac.NAME)
    assert len(cells) == 9
    assert dac.markdown(cells) in dac.DOCS.read_text()
