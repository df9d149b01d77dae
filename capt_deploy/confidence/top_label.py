"""Top-label calibration: how likely the most probable class is right, as a map of its log-odds.

Temperature scaling gives all confidences one slope. Where the reliability diagram bends, a monotone
map of the top confidence mends what it leaves: a straight line in log-odds (Platt scaling; of the
top label: Gupta & Ramdas, arXiv 2107.08353), or steps (isotonic regression, Zadrozny & Elkan 2002),
here joined by lines. The other classes keep their proportions, and the most probable class stays
the most probable one. The map is a few constants of the graph: `logits` are what temperature makes
of them, `probabilities` are mapped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.calibration import softmax

_Array = NDArray[np.floating]
_NOWHERE = -1e9  # a logit that no sum of exponentials sees
LEAD = 1e-3  # of the most probable class before the second one, so that it stays the first


@dataclass(frozen=True)
class TopLabelMap:
    """A monotone, piecewise linear map of log-odds ℓ = log(p/(1−p)) of the most probable class."""

    positions: tuple[float, ...]  # of its knots, ascending; one at least
    values: tuple[float, ...]  # at the knots, never falling
    below: float  # slope before the first knot, 0 or more
    above: float  # and behind the last one

    def __post_init__(self) -> None:
        numbers = (*self.positions, *self.values, self.below, self.above)
        if not self.positions or len(self.positions) != len(self.values):
            raise ValueError("top-label map: expected as many values as positions, at least one")
        if not all(isinstance(n, int | float) and isfinite(n) for n in numbers):
            raise ValueError("top-label map: expected finite numbers")
        if (np.diff(self.positions) <= 0).any() or (np.diff(self.values) < 0).any():
            raise ValueError("top-label map: expected rising positions, and values that never fall")
        if min(self.below, self.above) < 0:
            raise ValueError("top-label map: expected slopes of 0 or more")

    def __call__(self, log_odds: _Array) -> NDArray[np.float64]:
        """Return the mapped log-odds ℓ', of any shape."""
        wide = np.asarray(log_odds, np.float64)
        inside = np.interp(wide, self.positions, self.values)
        before = self.below * np.minimum(wide - self.positions[0], 0)
        return np.asarray(inside + before + self.above * np.maximum(wide - self.positions[-1], 0))

    def shifted(self, logits: _Array) -> NDArray[np.float64]:
        """Return logits (images, classes) whose softmax has the mapped top probability.

        That is the top logit plus ℓ' − ℓ, but at least LEAD more than the second one.
        """
        wide = logits.astype(np.float64)
        best, second, rest = _beside_the_top(wide)
        rows = np.arange(len(wide))
        odds = wide[rows, best] - rest
        wide[rows, best] = np.maximum(self(odds) + rest, second + LEAD)
        return wide

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        own = {"positions": list(self.positions), "values": list(self.values)}
        return {**own, "below": self.below, "above": self.above}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TopLabelMap":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        if unknown := set(values) - {"positions", "values", "below", "above"}:
            raise ValueError(f"top-label map: unknown keys {sorted(unknown)}")
        positions, own = (tuple(map(float, values[name])) for name in ("positions", "values"))
        return cls(positions, own, float(values["below"]), float(values["above"]))


def top_log_odds(logits: _Array) -> NDArray[np.float64]:
    """Return log(p/(1−p)) of the most probable class, (images,), of logits (images, classes)."""
    wide = logits.astype(np.float64)
    best, _, rest = _beside_the_top(wide)
    return np.asarray(wide[np.arange(len(wide)), best] - rest)


def _beside_the_top(logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], _Array, _Array]:
    """Return the most probable class, and of the others the largest logit and log Σ exp."""
    best = logits.argmax(axis=1)
    others = logits.copy()
    others[np.arange(len(logits)), best] = _NOWHERE
    second = others.max(axis=1)
    rest = second + np.log(np.exp(others - second[:, np.newaxis]).sum(axis=1))
    return best, second, rest


def probabilities_of(logits: _Array, top_label: TopLabelMap | None) -> NDArray[np.float64]:
    """Return the probabilities that calibrated logits (images, classes) stand for."""
    return softmax(logits if top_label is None else top_label.shifted(logits))
