"""Types and checks of probabilities and labels."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Probabilities = NDArray[np.floating]  # (images, classes) of any precision; rows sum to 1

# Rounding changes a row's sum by up to 2⁻¹¹ in float16 and 2⁻⁹ in bfloat16. Logits or percentages,
# passed by mistake, are further off.
SUM_TOLERANCE = 2e-3
_ROUNDED_ONE = 1 + 1e-6  # graphs that divide in float32 by multiplying reach a little above 1


def require_probabilities(probabilities: Probabilities) -> None:
    """Raise ValueError unless every row is a distribution over the classes.

    Raises:
        ValueError: not two axes, or an empty one; NaN, infinity, a negative number or one above
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
    """Raise ValueError unless each row has a label, an integer that is a column."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"expected (samples, classes) probabilities and as many labels, at least one; "
            f"came {probabilities.shape} and {labels.shape}"
        )
    require_columns(labels, probabilities.shape[1])


def require_columns(labels: Ints, classes: int) -> None:
    """Raise ValueError unless labels or predictions, at least one, are below `classes`."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"expected labels that are whole numbers, came {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"expected labels of {classes} classes, came {labels.min()} to {labels.max()}"
        )


def require_both(probabilities: Probabilities, labels: Ints) -> None:
    """Raise ValueError where `require_labels` or `require_probabilities` does."""
    require_labels(probabilities, labels)
    require_probabilities(probabilities)
