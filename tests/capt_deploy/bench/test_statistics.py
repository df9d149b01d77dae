import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capt_deploy.bench.statistics import has_settled, summarize

LATENCIES = st.lists(st.floats(0.001, 1e5), min_size=1, max_size=60)


def test_figures_of_a_series_that_can_be_checked_by_hand():
    own = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (own.p50_ms, own.mean_ms, own.iterations) == (3.0, 3.0, 5)
    assert own.p90_ms == pytest.approx(4.6)  # 0.9 of the way from 1 to 5, in four steps
    assert own.p95_ms == pytest.approx(4.8)
    assert own.p99_ms == pytest.approx(4.96)
    assert own.cv == pytest.approx(math.sqrt(10 / 4) / 3)


def test_a_single_run_is_every_percentile_and_varies_by_nothing():
    own = summarize([7.0])
    assert (own.p50_ms, own.p90_ms, own.p95_ms, own.p99_ms, own.mean_ms) == (7.0,) * 5
    assert (own.cv, own.iterations) == (0.0, 1)


@given(LATENCIES)
def test_percentiles_are_numpys_and_in_order(latencies):
    own = summarize(latencies)
    shares = {"p50_ms": 50, "p90_ms": 90, "p95_ms": 95, "p99_ms": 99}
    for name, share in shares.items():
        assert getattr(own, name) == pytest.approx(np.percentile(latencies, share))
    assert own.p50_ms <= own.p90_ms <= own.p95_ms <= own.p99_ms <= max(latencies) * (1 + 1e-12)
    assert own.cv >= 0


def test_nothing_cannot_be_summarized():
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


@pytest.mark.parametrize(
    ("latencies", "settled"),
    [
        ([], False),
        ([1.0] * 9, False),  # too few to compare two windows
        ([1.0] * 10, True),
        ([9.0] * 5 + [1.0] * 5, False),
        ([9.0] * 5 + [1.0] * 10, True),  # only the last two windows count
        ([1.0] * 5 + [1.04] * 5, True),
        ([1.0] * 5 + [1.06] * 5, False),
        ([1.06] * 5 + [1.0] * 5, False),
        ([1.0] * 5 + [1.0, 50.0, 1.0, 50.0, 1.0], True),  # slow runs that are no trend
    ],
)
def test_a_series_has_settled_once_two_windows_have_the_same_median(latencies, settled):
    assert has_settled(latencies, window=5, tolerance=0.05) is settled
