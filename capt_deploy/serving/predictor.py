"""Make predictions of a graph's outputs, for the bundle's classes and for added ones."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.read import Bundle
from capt_deploy.confidence.decisions import (
    BatchDecisions,
    DecisionOptions,
    partners,
)
from capt_deploy.confidence.monitor import Monitor
from capt_deploy.core.errors import BackendError, BundleError
from capt_deploy.serving.prediction import Prediction

if TYPE_CHECKING:
    from capt_deploy.serving.open_vocabulary import ClassHead, TextEncoder


@dataclass(frozen=True)
class _Classes:
    """The classes that predictions are made among; replaced as a whole when some are added."""

    names: tuple[str, ...]
    tuned: tuple[bool, ...]
    head: "ClassHead | None" = None  # of all classes, once some were added


class Predictor:
    """Makes predictions of a graph's outputs. Thread-safe."""

    def __init__(self, bundle: Bundle, decisions: DecisionOptions | None = None) -> None:
        """Read the scores of validation images; `decisions` are for calls that give none.

        Raises:
            BundleError: `decisions` are given, and the bundle has no scores of validation images.
            ConfigError: `decisions` cannot be promised with these scores.
        """
        self.bundle, manifest = bundle, bundle.manifest
        self._decisions = decisions
        self._usual = decisions or DecisionOptions()
        self._classes = _Classes(manifest.class_names, manifest.tuned)
        self._scores = bundle.decisions()  # of validation images, which have no added classes
        self._confused_with = partners(manifest.confusion_pairs, manifest.class_names)
        self._changing = Lock()
        self._texts: TextEncoder | None = None
        self._monitor: Monitor | None = None
        if decisions is not None:
            self._check(decisions)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of all probabilities, added ones last."""
        return self._classes.names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Return whether each class was tuned on."""
        return self._classes.tuned

    def options(self, coverage: float | None, accuracy: float | None) -> DecisionOptions:
        """Return the options of a call that gives these; None is as usual.

        Raises:
            BundleError: one is given, and there are no scores of validation images.
            ConfigError: they are no shares, or cannot be promised.
        """
        shares: dict[str, Any] = {"coverage": coverage, "accuracy": accuracy}
        given = {name: share for name, share in shares.items() if share is not None}
        if not given:
            return self._usual
        options = replace(self._usual, **given)
        self._check(options)
        return options

    def _check(self, options: DecisionOptions) -> None:
        if self._classes.head is not None:
            reason = "there are none for the classes that were added"
        elif self.bundle.lone_graph is not None:
            reason = "a lone graph has none; load the whole bundle"
        elif self._scores is None:
            reason = "the bundle has none; tune with two photos of each class or more"
        else:
            self._scores.check(options)
            return
        raise BundleError(
            f"prediction sets and rejection need scores of validation images, and {reason}"
        )

    def add_classes(self, names: Iterable[str], precision: str) -> None:
        """Add classes to all later predictions; see `Classifier.add_classes`."""
        from capt_deploy.serving.open_vocabulary import ClassHead, TextEncoder

        if self._decisions is not None:
            raise BundleError(
                f"classes cannot be added to a classifier loaded with {self._decisions}: nothing "
                f"is known about them from validation images; load it without `decisions`"
            )
        with self._changing:
            texts = self._texts = self._texts or TextEncoder.from_bundle(self.bundle)
            head = self._classes.head or ClassHead.from_bundle(self.bundle, precision)
            head = head.with_classes(texts, names)
            if head.class_names == self._classes.names:
                return
            lost = self._scores is not None and self._classes.head is None
            self._classes = _Classes(head.class_names, head.tuned, head)
            if self._monitor is not None:
                self._monitor.extend(head.class_names)
        if lost:
            warnings.warn(
                "classes were added: prediction_set, rejected and familiarity are None from now on",
                stacklevel=3,
            )

    def monitor(self) -> Monitor:
        """Return the monitor of all predictions from the first call on."""
        with self._changing:
            if self._monitor is None:
                expected = None if self._scores is None else self._scores.baseline(self._usual)
                self._monitor = Monitor(expected, self.class_names)
            return self._monitor

    def predictions(
        self, outputs: Outputs, precision: str, options: DecisionOptions
    ) -> list[Prediction]:
        """Return a prediction for each image, and count them in the monitor.

        Raises:
            BackendError: an output is not finite.
        """
        classes, monitor = self._classes, self._monitor
        probabilities, head = outputs.probabilities, classes.head
        if head is not None:
            probabilities = head.probabilities(head.logits(outputs.embedding))
        if bad := int((~np.isfinite(probabilities).all(axis=1)).sum()):
            raise BackendError(
                f"the graph's answers to {bad} of {len(probabilities)} images are not numbers; use "
                f"another precision of the bundle, or export it again"
            )
        best = probabilities.argmax(axis=1)
        decided = None
        if head is None and self._scores is not None:
            temperature = np.float32(self.bundle.manifest.calibration[precision]["temperature"])
            scaled_logits = outputs.logits * temperature
            decided = self._scores.decide(probabilities, scaled_logits, options)
        if monitor is not None:
            # It expects the share of rejections that the usual options cause.
            rejected = decided.rejected if decided and options == self._usual else None
            confidence = probabilities[np.arange(len(best)), best]
            familiarity = None if decided is None else decided.familiarity
            monitor.observe(confidence, best, rejected, familiarity)
        return [
            self._prediction(shares, int(best[row]), row, classes.names, decided)
            for row, shares in enumerate(probabilities)
        ]

    def predictions_each(
        self, outputs: Outputs, precision: str, options: Sequence[DecisionOptions]
    ) -> list[Prediction]:
        """Return a prediction for each image, made with the options of that image."""
        results: dict[int, Prediction] = {}
        for choice in set(options):
            rows = [row for row, option in enumerate(options) if option == choice]
            chosen = Outputs(*(part[rows] for part in outputs))
            results.update(zip(rows, self.predictions(chosen, precision, choice), strict=True))
        return [results[row] for row in range(len(options))]

    def _prediction(
        self,
        shares: NDArray[np.float32],
        label: int,
        row: int,
        names: tuple[str, ...],
        decided: BatchDecisions | None,
    ) -> Prediction:
        other = self._confused_with.get(label)
        confused_with = None if other is None else (names[other], float(shares[other]))
        answer = (names[label], float(shares[label]), shares, names)
        if decided is None:
            return Prediction(*answer, confused_with=confused_with)
        columns = np.flatnonzero(decided.sets[row])
        columns = columns[np.argsort(-shares[columns], kind="stable")]
        return Prediction(
            *answer,
            tuple(names[column] for column in columns),
            None if decided.rejected is None else bool(decided.rejected[row]),
            float(decided.familiarity[row]),
            confused_with,
        )
