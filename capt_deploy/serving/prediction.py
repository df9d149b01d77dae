"""What a classifier says about an image, and how it comes to say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.bundle.manifest import Manifest
from capt_deploy.confidence.decisions import Decided, DecisionOptions, Decisions, partners
from capt_deploy.confidence.monitor import Monitor
from capt_deploy.core.errors import BackendError, BundleError


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Prediction:
    """What the classifier says about one image.

    Set, rejection and familiarity are None where nothing is known of validation images: of a lone
    graph, a run without them, or once classes were added.
    """

    label: str
    confidence: float  # calibrated probability of `label`, 0-1
    probabilities: NDArray[np.float32]  # (classes,), in the order of `class_names`
    class_names: tuple[str, ...]
    # The classes of which one is right with the wanted coverage, most probable first
    prediction_set: tuple[str, ...] | None = None
    # Whether it is too unsure for the wanted accuracy; None where none is wanted
    rejected: bool | None = None
    # Share of the known images that look at most as familiar; near 0 where it is of no known class
    familiarity: float | None = None
    # The class that the model before tuning took most often for `label`, with its probability
    # here; None where that happened to none of the training images
    confused_with: tuple[str, float] | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the `k` most probable classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.class_names[index], float(self.probabilities[index])) for index in order]

    def to_dict(self, top_k: int) -> dict[str, Any]:
        """Return the JSON form, with the `top_k` most probable classes."""
        partner = self.confused_with
        return {
            "label": self.label,
            "confidence": self.confidence,
            "top_k": [{"label": name, "confidence": share} for name, share in self.top(top_k)],
            "prediction_set": self.prediction_set and [*self.prediction_set],
            "rejected": self.rejected,
            "familiarity": self.familiarity,
            "confused_with": partner and {"label": partner[0], "confidence": partner[1]},
        }

    def __repr__(self) -> str:
        rejected = ", rejected=True" if self.rejected else ""
        return f"Prediction(label={self.label!r}, confidence={self.confidence:.3f}{rejected})"


class Judge:
    """Makes predictions of a graph's answers. Thread-safe."""

    def __init__(
        self, manifest: Manifest, decisions: Decisions | None, added: Sequence[str] = ()
    ) -> None:
        """Begin with a bundle's classes and those `added` to it, whom no validation image knows."""
        self.class_names = (*manifest.class_names, *added)
        self.decisions = None if added else decisions
        self._partners = partners(manifest.confusion_pairs, manifest.class_names)

    def check(self, options: DecisionOptions, *, asked: bool = False) -> None:
        """Make sure that what is wanted can be had; `asked`: somebody wants it.

        Raises:
            BundleError: there are no scores of validation images.
            ConfigError: they promise the wanted accuracy at no confidence.
        """
        if self.decisions is not None:
            self.decisions.check(options)
        elif asked:
            raise BundleError(
                "nothing can be promised of sets and rejection: for that, the run needs validation "
                "images, the whole bundle must be loaded, and no class be added to it"
            )

    def predictions(
        self,
        probabilities: NDArray[np.float32],
        logits: NDArray[np.float32],
        options: DecisionOptions,
        watch: tuple[Monitor, DecisionOptions] | None = None,
    ) -> list[Prediction]:
        """Return a prediction for each image, and let a monitor see them.

        Args:
            probabilities: (images, classes).
            logits: likewise, times the temperature that they were divided by.
            options: what is wanted of sets and rejection.
            watch: a monitor, and the options whose rejections it counts.

        Raises:
            BackendError: an answer is not a number.
        """
        if bad := int((~np.isfinite(probabilities).all(axis=1)).sum()):
            raise BackendError(
                f"the graph's answers to {bad} of {len(probabilities)} images are not numbers; use "
                f"another precision of the bundle, or export it again"
            )
        best = probabilities.argmax(axis=1)
        decided = None
        if self.decisions is not None:
            decided = self.decisions.decide(probabilities, logits, options)
        if watch is not None:
            monitor, usual = watch
            confidence = probabilities[np.arange(len(best)), best]
            counted = None if decided is None or options != usual else decided.rejected
            monitor.observe(confidence, best, counted)
        return [
            self._prediction(own, int(best[row]), row, decided)
            for row, own in enumerate(probabilities)
        ]

    def _prediction(
        self, own: NDArray[np.float32], best: int, row: int, decided: Decided | None
    ) -> Prediction:
        names, other = self.class_names, self._partners.get(best)
        confused_with = None if other is None else (names[other], float(own[other]))
        simple = (names[best], float(own[best]), own, names)
        if decided is None:
            return Prediction(*simple, confused_with=confused_with)
        inside = np.flatnonzero(decided.sets[row])
        ordered = inside[np.argsort(-own[inside], kind="stable")]
        rejected = decided.rejected
        return Prediction(
            *simple,
            tuple(names[column] for column in ordered),
            None if rejected is None else bool(rejected[row]),
            float(decided.familiarity[row]),
            confused_with,
        )
