"""Prediction sets, rejection and familiarity of predictions, from scores of validation images.

A bundle carries the scores, so that coverage and accuracy can be chosen where it is used (METHOD
8). All promises are about images like the validation images, which are of the classes tuned on.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.conformal import (
    METHODS,
    Method,
    ScoreTable,
    choose_penalty,
    fewest_images,
)
from capt_deploy.confidence.familiarity import FamiliarityTable, negative_energy
from capt_deploy.confidence.monitor import UsageBaseline
from capt_deploy.confidence.rejection import RejectionTable
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.metrics.probabilities import Floats, Ints

FEWEST_IMAGES = 10  # with fewer validation images, nothing can be promised
_CACHED = 64  # thresholds kept; a server's clients may ask for any accuracy
_TABLES = ("sets", "rejection", "familiarity", "reference")  # prefixes of arrays in a bundle
_Array = NDArray[np.floating]


@dataclass(frozen=True)
class DecisionOptions:
    """What prediction sets and predictions that are not rejected must achieve; shares in 0-1."""

    coverage: float = 0.9  # share of prediction sets that hold the true class
    sets: Method = "lac"
    class_conditional: bool = False  # whether the coverage is promised for each class
    accuracy: float | None = None  # of predictions that are not rejected
    certainty: float = 0.95  # with which the accuracy is promised
    familiarity: float = 0.0  # less familiar images are rejected, as is that share of known images

    def __post_init__(self) -> None:
        for name in ("coverage", "accuracy", "certainty", "familiarity"):
            share = getattr(self, name)
            unset = (name == "accuracy" and share is None) or (name == "familiarity" and not share)
            if not unset and not (isinstance(share, int | float) and 0 < share < 1):
                raise ConfigError(
                    f"{name}: expected a share between 0 and 1, such as 0.9; came {share!r}"
                )
        if self.sets not in METHODS:
            raise ConfigError(f"sets: expected one of {', '.join(METHODS)}, came {self.sets!r}")

    @classmethod
    def from_given(cls, **shares: float | None) -> "DecisionOptions | None":
        """Return options with the shares that are given; None if none is.

        Raises:
            ConfigError: a share is not between 0 and 1.
        """
        given: dict[str, Any] = {name: share for name, share in shares.items() if share is not None}
        return cls(**given) if given else None


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class BatchDecisions:
    """Decisions about the images of a batch."""

    sets: NDArray[np.bool_]  # (images, classes)
    rejected: NDArray[np.bool_] | None  # (images,); None where nothing was to be rejected
    familiarity: Floats  # (images,)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Scores of validation images, by which other images are judged."""

    sets: ScoreTable
    rejection: RejectionTable
    familiarity: FamiliarityTable
    reference: UsageBaseline

    @classmethod
    def from_validation(cls, probabilities: _Array, logits: _Array, labels: Ints) -> "Decisions":
        """Return the scores of images that the calibration was not fitted on.

        Args:
            probabilities: calibrated, (images, classes).
            logits: calibrated, but times the temperature, (images, classes).
            labels: (images,) columns.
        """
        # As graphs return them: thresholds are compared with float32
        probabilities = probabilities.astype(np.float32)
        best, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        penalty = choose_penalty(probabilities, labels)
        return cls(
            ScoreTable.from_probabilities(probabilities, labels, penalty),
            RejectionTable(confidence, best == labels),
            FamiliarityTable(negative_energy(logits)),
            UsageBaseline.from_predictions(confidence, best, probabilities.shape[1]),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all tables as arrays of one axis, for a bundle."""
        return {
            f"{table}.{name}": np.ascontiguousarray(array)
            for table in _TABLES
            for name, array in getattr(self, table).arrays().items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], classes: int) -> "Decisions":
        """Return the tables from the result of `arrays`, for a bundle of that many classes.

        Raises:
            BundleError: an array is missing or does not belong to a table.
        """
        sets, rejection, familiarity, reference = (
            {name.split(".", 1)[1]: a for name, a in arrays.items() if name.startswith(f"{table}.")}
            for table in _TABLES
        )
        try:
            decisions = cls(
                ScoreTable.from_arrays(sets),
                RejectionTable.from_arrays(rejection),
                FamiliarityTable.from_arrays(familiarity),
                UsageBaseline.from_arrays(reference),
            )
            decisions._check(classes)
        except (KeyError, ValueError) as cause:
            raise BundleError(f"the scores of its validation images: {cause}") from cause
        return decisions

    def _check(self, classes: int) -> None:
        if self.sets.labels.max() >= classes or len(self.reference.class_shares) != classes:
            raise ValueError(f"they are not of {classes} classes")
        tables = (self.sets.labels, self.rejection.confidence, self.familiarity.scores)
        if (counts := {*map(len, tables)}) != {self.images}:
            raise ValueError(f"of {self.images} images, came scores of {sorted(counts)}")

    @property
    def images(self) -> int:
        """Return the number of validation images."""
        return self.reference.images

    def check(self, options: DecisionOptions) -> None:
        """Raise ConfigError where the options cannot be fulfilled; warn where sets say nothing.

        Raises:
            ConfigError: no threshold promises the accuracy, or the images are too few for so low a
                familiarity.
        """
        if notice := self._notice(options):
            warnings.warn(notice, stacklevel=6)
        self.threshold(options)
        least = 1 / (self.images + 1)
        if 0 < options.familiarity <= least:
            raise ConfigError(
                f"familiarity {options.familiarity}: with {self.images} validation images none is "
                f"below {least:.2g}, so that nothing would be rejected; ask for more"
            )

    def _notice(self, options: DecisionOptions) -> str:
        """Return a sentence where too few images make sets hold every class; else nothing."""
        needed, start = fewest_images(options.coverage), f"coverage {options.coverage}"
        if not options.class_conditional:
            too_few = self.images < needed
            why = f"it needs {needed} held-out photos, and there are {self.images}"
            return f"{start}: {why}: every set holds all classes" if too_few else ""
        counts = np.bincount(self.sets.labels)
        known, scarce = int((counts > 0).sum()), int(((counts > 0) & (counts < needed)).sum())
        why = (
            f"it needs {needed} held-out photos of a class; {scarce} of {known} classes have fewer"
        )
        return f"{start} for each class: {why} and are in every set" if scarce else ""

    def threshold(self, options: DecisionOptions) -> float | None:
        """Return the confidence below which predictions are rejected; None where none are.

        Raises:
            ConfigError: no threshold promises the accuracy.
        """
        if options.accuracy is None:
            return None
        threshold = self._cached_threshold(options.accuracy, options.certainty)
        if threshold is None:
            raise ConfigError(
                f"accuracy {options.accuracy}: with the {self.images} validation images of the "
                f"run it cannot be promised with a certainty of {options.certainty}; "
                f"{self._advice(options.certainty)}"
            )
        return threshold

    @cached_property
    def _cached_threshold(self) -> Callable[[float, float], float | None]:
        return lru_cache(_CACHED)(self.rejection.threshold)

    def _advice(self, certainty: float) -> str:
        """Return the highest accuracy that can be promised, in words."""
        for percent in range(99, 0, -1):
            if self.rejection.threshold(percent / 100, certainty) is not None:
                return f"the most is {percent / 100}, or tune with more validation images"
        return "tune with more validation images"

    def decide(
        self, probabilities: _Array, logits: _Array, options: DecisionOptions
    ) -> BatchDecisions:
        """Return the decisions about a batch of images.

        Args:
            probabilities: calibrated, (images, classes).
            logits: calibrated, but times the temperature, (images, classes).
            options: what the decisions must achieve.

        Raises:
            ConfigError: no threshold promises the accuracy.
        """
        sets = self.sets.sets(
            probabilities, options.coverage, options.sets, options.class_conditional
        )
        familiarity = self.familiarity.p_value(negative_energy(logits))
        threshold = self.threshold(options)
        rejected = None
        if threshold is not None or options.familiarity > 0:
            rejected = familiarity < options.familiarity
            if threshold is not None:
                rejected = rejected | (probabilities.max(axis=1) < threshold)
        return BatchDecisions(sets, rejected, familiarity)

    def baseline(self, options: DecisionOptions) -> UsageBaseline:
        """Return the baseline, with the share of validation images that these options reject."""
        threshold, rate = self.threshold(options), None
        # Unsure images are often unfamiliar too, so that the two shares cannot be combined.
        if threshold is not None and not options.familiarity:
            rate = self.rejection.expected_rejection(threshold)
        return replace(self.reference, rejection_rate=rate)


def partners(pairs: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[int, int]:
    """Return for each predicted column that of the class most often mistaken for it."""
    columns = {name: column for column, name in enumerate(class_names)}
    worst: dict[int, tuple[int, int]] = {}
    for pair in pairs:
        predicted, true = columns[pair["predicted"]], columns[pair["true"]]
        count = int(pair.get("count", 1))
        if predicted not in worst or count > worst[predicted][0]:
            worst[predicted] = (count, true)
    return {predicted: true for predicted, (_, true) in worst.items()}
