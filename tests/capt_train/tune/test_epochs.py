from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capt_train.tune.epochs import learning_rate

counts = st.integers(1, 200)


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    rates = [learning_rate(step, total=20, warmup=4, peak=0.8) for step in range(4)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_cosine_starts_at_the_peak_is_half_in_the_middle_and_ends_near_zero() -> None:
    rates = [learning_rate(step, total=104, warmup=4, peak=2.0) for step in range(4, 104)]
    expected = [1 + math.cos(math.pi * step / 100) for step in range(100)]
    assert rates == pytest.approx(expected)
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, total=10, warmup=0, peak=0.3) == 0.3


def test_a_warm_up_may_have_a_constant_rate() -> None:
    rates = [learning_rate(step, 20, 4, 0.8, warmup_rate=1e-5) for step in range(5)]
    assert rates == [1e-5] * 4 + [0.8]


@given(total=counts, warmup=st.integers(0, 20), peak=st.floats(1e-6, 10))
def test_rate_stays_positive_and_below_the_peak_and_falls_after_warm_up(
    total: int, warmup: int, peak: float
) -> None:
    rates = [learning_rate(step, total + warmup, warmup, peak) for step in range(total + warmup)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
