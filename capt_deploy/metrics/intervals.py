"""95 % intervals of accuracies; they say something also where every image is right."""

import math

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.probabilities import Floats, Ints

Interval = tuple[float, float]
_Z = 1.96  # of 95 %


def accuracy_interval(right: NDArray[np.bool_]) -> Interval:
    """Return the interval of the accuracy on (images,), 1 or more, that are right or wrong."""
    low, high = wilson(np.array([right.mean()]), np.array([len(right)]))
    return float(low[0]), float(high[0])


def wilson(shares: Floats, images: Ints) -> tuple[Floats, Floats]:
    """Return low and high ends, (n,), of the intervals of shares of images (Wilson 1927).

    Args:
        shares: (n,) in 0-1.
        images: (n,), each 1 or more.
    """
    centre = (shares + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    spread = np.sqrt(shares * (1 - shares) / images + (_Z / (2 * images)) ** 2)
    half = _Z * spread / (1 + _Z**2 / images)
    # whatever rounding does
    return np.clip(centre - half, 0, shares), np.clip(centre + half, shares, 1)


def harmonic_mean(base: float, new: float) -> float:
    """Return 2·base·new/(base+new); 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def interval_of_harmonic_mean(
    shares: tuple[float, float], intervals: tuple[Interval, Interval]
) -> Interval:
    """Return the interval of the harmonic mean of two shares of different images.

    Either end is where the mean comes to when both shares go towards their own end, each so much
    of the way as it matters to the mean. Where the mean is a plane, the squares of what each would
    move it by alone add up, as in MOVER (Zou & Donner 2008); it is not one near 0.

    Args:
        shares: in 0-1.
        intervals: of each, holding it.
    """
    first, second = shares
    mean, ends = harmonic_mean(first, second), []
    for one, other in zip(*intervals, strict=True):
        moves = harmonic_mean(one, second) - mean, harmonic_mean(first, other) - mean
        whole = math.hypot(*moves)
        # of two that move nothing alone, such as 0 and 0, one matters as much as the other
        own, its = (abs(move) / whole for move in moves) if whole else (0.5**0.5, 0.5**0.5)
        ends.append(harmonic_mean(first + own * (one - first), second + its * (other - second)))
    return ends[0], ends[1]
