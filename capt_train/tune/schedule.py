"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

import math


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the rate for a 0-based step: linear warm-up to `peak`, then a half cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
