"""95 % intervals of accuracies, which have a width even where every image is right."""

import math

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.probabilities import Floats, Ints

Interval = tuple[float, float]
_Z = 1.96  # of 95 %


def accuracy_interval(right: NDArray[np.bool_]) -> Interval:
    """Return the interval of the accuracy, from whether each image is right, (images,)."""
    low, high = wilson(np.array([right.mean()]), np.array([len(right)]))
    return float(low[0]), float(high[0])


def wilson(shares: Floats, images: Ints) -> tuple[Floats, Floats]:
    """Return low and high ends, (n,), of Wilson's (1927) intervals of shares of images.

    Args:
        shares: (n,) in 0-1.
        images: (n,), each 1 or more.
    """
    centre = (shares + _Z**2 / (2 * images)) / (1 + _Z**2 / images)
    spread = np.sqrt(shares * (1 - shares) / images + (_Z / (2 * images)) ** 2)
    half = _Z * spread / (1 + _Z**2 / images)
    # rounding must not leave the share outside
    return np.clip(centre - half, 0, shares), np.clip(centre + half, shares, 1)


def harmonic_mean(base: float, new: float) -> float:
    """Return 2·base·new/(base+new); 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def interval_of_harmonic_mean(
    shares: tuple[float, float], intervals: tuple[Interval, Interval]
) -> Interval:
    """Return the interval of the harmonic mean of two shares of different images.

    Both shares move towards the same end of their intervals, each as far as it matters to the mean.
    Where the mean is linear, the squares of the two effects add up, as in MOVER (Zou & Donner
    2008); near 0 it is not.

    Args:
        shares: in 0-1.
        intervals: of each share, which they contain.
    """
    first, second = shares
    mean, ends = harmonic_mean(first, second), []
    for first_end, second_end in zip(*intervals, strict=True):
        effects = harmonic_mean(first_end, second) - mean, harmonic_mean(first, second_end) - mean
        total = math.hypot(*effects)
        # Where neither has an effect alone, as for 0 and 0, both matter equally.
        a, b = (abs(effect) / total for effect in effects) if total else (0.5**0.5, 0.5**0.5)
        moved = first + a * (first_end - first), second + b * (second_end - second)
        ends.append(harmonic_mean(*moved))
    return ends[0], ends[1]
