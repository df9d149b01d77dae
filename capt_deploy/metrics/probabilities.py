"""Arrays of probabilities and their labels: what they are called, and what is refused."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Probabilities = NDArray[np.floating]  # (images, classes) of any precision; rows sum to 1

# A row's sum may be off by what rounding does to its parts: up to 2⁻¹¹ of it in float16, 2⁻⁹ in
# bfloat16. What was no distribution to begin with (logits, percentages) is further off.
SUM_TOLERANCE = 2e-3
_ROUNDED_ONE = 1 + 1e-6  # float32 graphs that divide by multiplying reach a little above 1


def require_probabilities(probabilities: Probabilities) -> None:
    """Check that every row is a distribution over the classes.

    Raises:
        ValueError: not two axes, or nothing in them; NaN, infinity, a negative number or one above
            1; a row whose sum is further from 1 than `SUM_TOLERANCE`.
    """
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(
            f"expected (samples, classes) probabilities, at least one; came {probabilities.shape}"
        )
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        sums = probabilities.sum(axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():  # one number that is not finite is enough
        raise ValueError("expected finite probabilities, came NaN or infinity")
    low, high = float(probabilities.min()), float(probabilities.max())
    if low < 0 or high > _ROUNDED_ONE:
        raise ValueError(f"expected probabilities from 0 to 1, came {low:.6g} to {high:.6g}")
    worst = float(sums[np.abs(sums - 1).argmax()])
    if abs(worst - 1) > SUM_TOLERANCE:
        raise ValueError(f"expected rows that sum to 1, came a sum of {worst:.6g}")


def require_labels(probabilities: Probabilities, labels: Ints) -> None:
    """Check that there is one label per row, and that each is a column.

    Raises:
        ValueError: not so, or the labels are no integers, or there are none.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"expected (samples, classes) probabilities and as many labels, at least one; "
            f"came {probabilities.shape} and {labels.shape}"
        )
    require_columns(labels, probabilities.shape[1])


def require_columns(labels: Ints, classes: int) -> None:
    """Check that labels or predictions, at least one, are columns of so many classes.

    Raises:
        ValueError: they are not.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected labels that are whole numbers, came {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"expected labels of {classes} classes, came {labels.min()} to {labels.max()}"
        )


def require_both(probabilities: Probabilities, labels: Ints) -> None:
    """Check both, and that they belong together; raises ValueError."""
    require_labels(probabilities, labels)
    require_probabilities(probabilities)
