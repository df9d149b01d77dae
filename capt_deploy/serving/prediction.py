"""The classifier's answer for one image."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Prediction:
    """The classifier's answer for one image.

    `prediction_set`, `rejected` and `familiarity` need scores of validation images. They are None
    for a lone graph, for a bundle without such scores, and once classes were added.
    """

    label: str
    confidence: float  # calibrated probability of `label`, 0-1
    probabilities: NDArray[np.float32]  # (classes,), in the order of `class_names`
    class_names: tuple[str, ...]
    # The classes among which the true one is with the wanted coverage, most probable first
    prediction_set: tuple[str, ...] | None = None
    # Whether the prediction is too unsure for the wanted accuracy; None where none is wanted
    rejected: bool | None = None
    # Share of the validation images that look at most as familiar; near 0 for unknown classes
    familiarity: float | None = None
    # The class that the model before tuning took most often for `label`, with its probability
    # here; None if that happened to no training image
    confused_with: tuple[str, float] | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the `k` most probable classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.class_names[index], float(self.probabilities[index])) for index in order]

    def to_dict(self, top_k: int) -> dict[str, Any]:
        """Return the JSON form, with the `top_k` most probable classes."""
        confused = self.confused_with
        return {
            "label": self.label,
            "confidence": self.confidence,
            "top_k": [{"label": name, "confidence": share} for name, share in self.top(top_k)],
            "prediction_set": self.prediction_set and [*self.prediction_set],
            "rejected": self.rejected,
            "familiarity": self.familiarity,
            "confused_with": confused and {"label": confused[0], "confidence": confused[1]},
        }

    def __repr__(self) -> str:
        rejected = ", rejected=True" if self.rejected else ""
        return f"Prediction(label={self.label!r}, confidence={self.confidence:.3f}{rejected})"
