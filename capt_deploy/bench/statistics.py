"""Figures of a series of latencies, and when a series has settled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# With fewer, the 99th percentile lies between the two slowest runs and says little.
ENOUGH_FOR_P99 = 100


@dataclass(frozen=True)
class Summary:
    """What is said of a series; the percentiles interpolate linearly between two runs."""

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    cv: float  # standard deviation (of a sample) over mean; 0 for a single run
    iterations: int


def summarize(latencies_ms: Sequence[float]) -> Summary:
    """Return the figures of a series.

    Raises:
        ValueError: it is empty.
    """
    if not len(latencies_ms):
        raise ValueError("expected at least one latency")
    values = np.asarray(latencies_ms, dtype=np.float64)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Summary(p50, p90, p95, p99, mean, deviation / mean if mean else 0.0, len(values))


def has_settled(latencies_ms: Sequence[float], window: int, tolerance: float) -> bool:
    """Tell whether warming up is over.

    It is when the medians of the last `window` runs and of the `window` before them differ by no
    more than `tolerance`, a share. A single slow run moves no median; a trend moves both.
    """
    if len(latencies_ms) < 2 * window:
        return False
    before = float(np.median(latencies_ms[-2 * window : -window]))
    last = float(np.median(latencies_ms[-window:]))
    return abs(last - before) <= tolerance * before
