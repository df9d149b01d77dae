"""Against a grid search for the lowest summed NLL plus the prior, both written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capt_train.calibrate.temperature import fit_temperature

GRID = np.geomspace(0.05, 20, 1201)  # steps of 0.5 %


def noisy_logits(seed: int, sharpness: float, batch: int = 200) -> tuple[Tensor, Tensor]:
    """Labels drawn from softmax(z), and the logits z·sharpness."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * sharpness, labels


def summed_nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    scaled = logits.double().numpy() / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    own = scaled[np.arange(len(scaled)), labels.numpy()]
    return float((np.log(np.exp(scaled).sum(axis=1)) - own).sum())


def objective(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """What is minimised: the prior on log T has mean 0 and standard deviation 0.5."""
    return summed_nll(logits, labels, temperature) + np.log(temperature) ** 2 / (2 * 0.5**2)


def best_on_grid(logits: Tensor, labels: Tensor, prior: bool = True) -> float:
    cost = objective if prior else summed_nll
    return float(min(GRID, key=lambda value: cost(logits, labels, float(value))))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.2, 8), batch=st.integers(1, 200))
def test_no_temperature_on_a_fine_grid_explains_the_labels_better(
    seed: int, sharpness: float, batch: int
) -> None:
    logits, labels = noisy_logits(seed, sharpness, batch)
    fitted, expected = fit_temperature(logits, labels), best_on_grid(logits, labels)
    assert fitted == pytest.approx(expected, rel=0.006)
    assert objective(logits, labels, fitted) <= objective(logits, labels, expected) + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.2, 8), batch=st.integers(1, 50))
def test_the_prior_draws_towards_1_and_not_past_it(seed: int, sharpness: float, batch: int) -> None:
    logits, labels = noisy_logits(seed, sharpness, batch)
    fitted, free = fit_temperature(logits, labels), best_on_grid(logits, labels, prior=False)
    low, high = sorted([1.0, free])
    assert 0.994 * low <= fitted <= 1.006 * high


def test_temperature_finds_back_how_much_too_sharp_the_logits_are() -> None:
    logits, labels = noisy_logits(0, sharpness=4.0, batch=4000)
    assert fit_temperature(logits, labels) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0, 8.0])
def test_with_1000_samples_the_prior_hardly_shows(sharpness: float) -> None:
    logits, labels = noisy_logits(1, sharpness, batch=1000)
    free = best_on_grid(logits, labels, prior=False)
    assert fit_temperature(logits, labels) == pytest.approx(free, rel=0.02)


def test_the_samples_are_summed_so_that_more_of_them_outweigh_the_prior() -> None:
    logits, labels = noisy_logits(1, sharpness=6.0, batch=20)
    free = best_on_grid(logits, labels, prior=False)
    fits = [fit_temperature(logits.repeat(n, 1), labels.repeat(n)) for n in (1, 4, 16, 1000)]
    assert 1 < fits[0] < fits[1] < fits[2] < fits[3]
    assert fits[0] < 0.97 * free
    assert fits[3] == pytest.approx(free, rel=0.006)


@pytest.mark.parametrize("gap", [2.0, 3.0, 10.0, 100.0])
def test_ten_separated_samples_leave_the_temperature_near_1(gap: float) -> None:
    logits, labels = gap * torch.eye(10), torch.arange(10)
    assert best_on_grid(logits, labels, prior=False) < 0.11  # the likelihood alone runs away
    assert 0.3 < fit_temperature(logits, labels) <= 1 + 1e-6


def test_three_contradicted_samples_leave_the_temperature_near_1() -> None:
    logits, labels = torch.eye(3), torch.tensor([1, 2, 0])
    assert best_on_grid(logits, labels, prior=False) == pytest.approx(20)
    assert 1 < fit_temperature(logits, labels) < 2


@pytest.mark.parametrize("seed", range(5))
def test_a_few_right_samples_do_not_ruin_the_nll_of_others(seed: int) -> None:
    logits, labels = noisy_logits(seed, sharpness=1.0, batch=4000)
    right = (logits.argmax(1) == labels).nonzero().squeeze(1)[:10]
    fitted = fit_temperature(logits[right], labels[right])
    free = best_on_grid(logits[right], labels[right], prior=False)
    assert free < 0.2
    untouched = summed_nll(logits, labels, 1.0)
    assert summed_nll(logits, labels, free) > 3 * untouched
    assert summed_nll(logits, labels, fitted) < 1.3 * untouched


def test_only_enormous_data_reach_the_bounds() -> None:
    logits, labels = torch.eye(3), torch.arange(3)
    few, many = 10, 1000
    contradicted = labels.roll(1)
    assert fit_temperature(logits.repeat(few, 1), contradicted.repeat(few)) < 15
    assert fit_temperature(logits.repeat(many, 1), contradicted.repeat(many)) == pytest.approx(20)
    flat = 0.1 * logits
    assert fit_temperature(flat, labels) > 0.5
    assert fit_temperature(flat.repeat(many, 1), labels.repeat(many)) == pytest.approx(0.05)


def test_half_precision_logits_are_fitted_in_double() -> None:
    logits, labels = noisy_logits(2, sharpness=3.0)
    half = logits.half()
    assert fit_temperature(half, labels) == pytest.approx(fit_temperature(half.double(), labels))
