"""Each case of the benchmark measures what it says, on as much as a test has time for."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.metrics_speed import CASES, Case, made, measure
from capt_deploy.metrics.probabilities import require_both


@pytest.mark.parametrize("case", CASES[2:], ids=lambda case: case.function)
def test_every_function_takes_what_is_made(case: Case) -> None:
    row = measure(replace(case, images=30, classes=4))
    assert row["input_bytes"] == 30 * (4 * 4 + 8)
    assert 0 < row["seconds"] <= row["slowest_seconds"]
    assert row["peak_bytes"] >= row["peak_bytes_before"] > row["input_bytes"]


def test_what_is_made_are_float32_probabilities_to_the_last_row() -> None:
    probabilities, labels = made(Case("all_metrics", 10_001, 3))
    assert probabilities.dtype == np.float32
    require_both(probabilities, labels)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(labels)) == 3
    flat, _ = made(Case("all_metrics", 500, 100, sharpness=0.3))
    sharp, _ = made(Case("all_metrics", 500, 100))
    assert flat.max() < 1 / 15 < np.median(sharp.max(axis=1))
