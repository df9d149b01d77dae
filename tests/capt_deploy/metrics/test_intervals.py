"""Intervals hold the true accuracy as often as they say, and are those of their equations."""

import numpy as np
import pytest

from capt_deploy.metrics.intervals import (
    accuracy_interval,
    harmonic_mean,
    interval_of_harmonic_mean,
    wilson,
)


def test_wilsons_ends_are_the_shares_from_which_the_observed_one_is_two_errors_away() -> None:
    shares, images = np.array([0.0, 0.3, 0.5, 0.99, 1.0]), np.array([10, 7, 1000, 100, 3])
    for ends in wilson(shares, images):
        away = (shares - ends) ** 2
        np.testing.assert_allclose(away, 1.96**2 * ends * (1 - ends) / images, atol=1e-12)
    low, high = wilson(shares, images)
    assert ((low <= shares) & (shares <= high)).all()
    assert (low[1:-1] < shares[1:-1]).all() and (shares[1:-1] < high[1:-1]).all()


def test_all_right_and_all_wrong_have_an_interval() -> None:
    low, high = accuracy_interval(np.ones(50, bool))
    assert (low, high) == (pytest.approx(50 / (50 + 1.96**2)), 1)
    low, high = accuracy_interval(np.zeros(50, bool))
    assert (low, high) == (0, pytest.approx(1.96**2 / (50 + 1.96**2)))


@pytest.mark.parametrize(
    ("truth", "images"),
    [((0.5, 0.6), (400, 300)), ((0.9, 0.3), (60, 60)), ((0.97, 0.99), (80, 40))],
)
def test_intervals_hold_the_true_mean_as_often_as_they_say(
    truth: tuple[float, float], images: tuple[int, int]
) -> None:
    random, held, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        right = [random.random(count) < share for share, count in zip(truth, images, strict=True)]
        shares = (float(right[0].mean()), float(right[1].mean()))
        both = (accuracy_interval(right[0]), accuracy_interval(right[1]))
        low, high = interval_of_harmonic_mean(shares, both)
        held += low <= harmonic_mean(*truth) <= high
    assert 0.93 < held / draws < 0.98


def test_of_one_share_that_is_known_the_other_alone_decides() -> None:
    known, open_one = (0.6, 0.6), (0.3, 0.5)
    low, high = interval_of_harmonic_mean((0.6, 0.4), (known, open_one))
    assert (low, high) == (
        pytest.approx(harmonic_mean(0.6, 0.3)),
        pytest.approx(harmonic_mean(0.6, 0.5)),
    )


def test_a_mean_of_nothing_right_begins_at_nothing_and_does_not_end_there() -> None:
    none = accuracy_interval(np.zeros(20, bool))
    low, high = interval_of_harmonic_mean((0.0, 0.0), (none, none))
    assert low == 0
    assert 0 < high < none[1]
