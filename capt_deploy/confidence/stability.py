"""Whether counts still follow the shares of a reference: the population stability index (PSI).

PSI of two sets of shares, Σ (a - e)·ln(a / e), is usually read as steady below 0.1 and as shifted
above 0.25. But images of the very same world reach about (bins - 1)·(1/n + 1/m) by chance alone,
n of them now and m in the reference; spread as χ² with bins - 1 degrees of freedom, times
(1/n + 1/m). So a PSI says something only above what chance reaches once in a thousand.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from capt_deploy.metrics.calibration import Floats, Ints

WATCH, SHIFTED = 0.1, 0.25  # PSI
_RARELY = 3.09  # standard deviations that a normal variable exceeds once in a thousand


@dataclass(frozen=True)
class Comparison:
    """How far what was counted is from the reference."""

    psi: float
    chance: float  # PSI that images of the reference's own world exceed once in a thousand

    @property
    def verdict(self) -> Literal["steady", "watch", "shifted"]:
        """What it says; steady is also what cannot be told from chance yet."""
        if self.psi <= max(WATCH, self.chance):
            return "steady"
        return "watch" if self.psi <= SHIFTED else "shifted"

    def __str__(self) -> str:
        return f"PSI {self.psi:.2f} (by chance below {self.chance:.2f})"


def compare(counts: Ints, shares: Floats, reference_images: int) -> Comparison | None:
    """Return how far (bins,) counts are from (bins,) shares; None where nothing was counted."""
    images = int(counts.sum())
    if not images:
        return None
    index = population_stability_index(counts, shares, reference_images)
    return Comparison(index, chance_limit(len(shares), images, reference_images))


def chance_limit(bins: int, images: int, reference_images: int) -> float:
    """Return the PSI that images of the reference's own world exceed once in a thousand.

    By the approximation of the χ² distribution of Wilson & Hilferty (1931).
    """
    freedom = max(bins - 1, 1)
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + _RARELY * spread**0.5) ** 3
    return float(quantile * (1 / images + 1 / reference_images))


def population_stability_index(counts: Ints, shares: Floats, reference_images: int) -> float:
    """Return Σ (a - e)·ln(a / e), which is 0 where nothing has changed.

    Half an image is added to every bin on both sides, so that empty bins give no infinity.

    Args:
        counts: (bins,) of images in use.
        shares: (bins,) expected, e before anything is added.
        reference_images: that the shares were counted among.
    """
    half = 0.5 * len(counts)
    observed = (counts + 0.5) / (counts.sum() + half)
    expected = (shares * reference_images + 0.5) / (reference_images + half)
    return float(((observed - expected) * np.log(observed / expected)).sum())
