"""PSI by hand and against its definition, and how often chance alone is taken for a shift."""

import math

import numpy as np
import pytest

from capt_deploy.confidence.stability import (
    Comparison,
    chance_limit,
    compare,
    population_stability_index,
)


def test_the_index_of_a_case_done_by_hand() -> None:
    # 3 and 1 images where halves are expected of 4: (3.5, 1.5) / 5 against (2.5, 2.5) / 5
    got = population_stability_index(np.array([3, 1]), np.array([0.5, 0.5]), 4)
    assert got == pytest.approx(0.2 * math.log(0.7 / 0.5) - 0.2 * math.log(0.3 / 0.5))


def test_the_index_of_many_images_is_the_papers_without_smoothing() -> None:
    shares, counts = np.array([0.2, 0.3, 0.5]), np.array([400_000, 300_000, 300_000])
    slow = sum((a - e) * math.log(a / e) for a, e in zip(counts / 1e6, shares, strict=True))
    assert population_stability_index(counts, shares, 10**6) == pytest.approx(slow, rel=1e-5)


def test_the_index_is_zero_without_a_change_and_finite_with_the_largest() -> None:
    shares = np.array([0.25, 0.75, 0.0])
    assert population_stability_index(np.array([10, 30, 0]), shares, 40) == 0
    worst = population_stability_index(np.array([0, 0, 10**6]), shares, 10**6)
    assert 20 < worst < 40


@pytest.mark.parametrize("freedom", [1, 2, 12, 99, 999])
def test_the_limit_is_near_the_quantile_of_chi_squared(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")
    limit = chance_limit(freedom + 1, 100, 400)
    assert limit == pytest.approx(stats.chi2.isf(0.001, freedom) / 80, rel=0.04)


@pytest.mark.parametrize("bins", [2, 13, 100])
@pytest.mark.parametrize("skewed", [False, True])
def test_chance_alone_is_rarely_taken_for_a_shift(bins: int, skewed: bool) -> None:
    random = np.random.default_rng(bins)
    truth = random.dirichlet(np.full(bins, 0.3)) if skewed else np.full(bins, 1 / bins)
    alarms = above_watch = 0
    for reference_images in (50, 1000):
        for images in (10, 100, 1000):
            for _ in range(200):
                shares = random.multinomial(reference_images, truth) / reference_images
                found = compare(random.multinomial(images, truth), shares, reference_images)
                assert found is not None
                alarms += found.verdict != "steady"
                above_watch += found.psi > 0.1
    assert alarms <= 6  # of 1200, each with a chance of about 1 in 1000
    assert above_watch > 10 * alarms + 50, "the usual limits alone must be wrong for these"


def test_a_shift_is_found() -> None:
    shares = np.full(10, 0.1)
    moved = np.array([200, 200, 200, 200, 200, 0, 0, 0, 0, 0])
    found = compare(moved, shares, 1000)
    assert found is not None
    assert found.verdict == "shifted"
    slightly = np.array([50, 50, 80, 80, 100, 100, 120, 120, 150, 150])
    found = compare(slightly, shares, 1000)
    assert found is not None
    assert found.verdict == "watch"
    assert compare(moved * 0, shares, 1000) is None


def test_the_usual_limits_hold_where_chance_is_small() -> None:
    for psi, verdict in ((0.1, "steady"), (0.11, "watch"), (0.25, "watch"), (0.26, "shifted")):
        assert Comparison(psi, 0.01).verdict == verdict
    assert Comparison(0.3, 0.4).verdict == "steady"
    assert str(Comparison(0.3, 0.2)) == "PSI 0.30 (by chance below 0.20)"
