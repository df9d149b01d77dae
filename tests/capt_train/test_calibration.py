from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capt_train.calibration import fit_temperature


def noisy_logits(seed: int, sharpness: float, batch: int = 200) -> tuple[Tensor, Tensor]:
    """Labels drawn from softmax(z), and the logits z·sharpness."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * sharpness, labels


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    scaled = logits.numpy() / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    own = scaled[np.arange(len(scaled)), labels.numpy()]
    return float((np.log(np.exp(scaled).sum(axis=1)) - own).mean())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.2, 8))
def test_no_temperature_on_a_fine_grid_has_a_lower_nll(seed: int, sharpness: float) -> None:
    logits, labels = noisy_logits(seed, sharpness)
    best = nll(logits, labels, fit_temperature(logits, labels))
    grid = np.geomspace(0.05, 20, 400)
    assert best <= min(nll(logits, labels, float(value)) for value in grid) + 1e-9


def test_temperature_finds_back_how_much_too_sharp_the_logits_are() -> None:
    logits, labels = noisy_logits(0, sharpness=4.0, batch=4000)
    assert fit_temperature(logits, labels) == pytest.approx(4.0, rel=0.1)


def test_temperature_scales_with_the_logits() -> None:
    logits, labels = noisy_logits(1, sharpness=1.0)
    once, thrice = fit_temperature(logits, labels), fit_temperature(3 * logits, labels)
    assert thrice == pytest.approx(3 * once, rel=1e-9)


def test_perfectly_separated_labels_give_the_lower_bound() -> None:
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(0.05)


def test_labels_that_contradict_the_logits_give_the_upper_bound() -> None:
    assert fit_temperature(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(20)


def test_half_precision_logits_are_fitted_in_double() -> None:
    logits, labels = noisy_logits(2, sharpness=3.0)
    half = logits.half()
    assert fit_temperature(half, labels) == pytest.approx(fit_temperature(half.double(), labels))
