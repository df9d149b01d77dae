"""What a prediction is worth: prediction set, rejection, familiarity, and who it is mistaken for.

A bundle carries what its validation images got, so that coverage and accuracy can be chosen where
it is used (METHOD 8). All of it is about images of the classes tuned on, as these images are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.conformal import METHODS, Method, ScoreTable, choose_penalty
from capt_deploy.confidence.familiarity import FamiliarityTable, negative_energy
from capt_deploy.confidence.monitor import Reference
from capt_deploy.confidence.rejection import RejectionTable
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.metrics.calibration import Floats, Ints

FEWEST_IMAGES = 10  # that say anything about others
_CACHED = 64  # thresholds kept; a server's clients may ask for any accuracy
_PARTS = ("sets", "rejection", "familiarity", "reference")  # in front of the names of arrays
_Array = NDArray[np.floating]


@dataclass(frozen=True)
class DecisionOptions:
    """What is wanted of prediction sets and of what is not rejected; shares in 0-1."""

    coverage: float = 0.9  # of prediction sets
    sets: Method = "lac"
    class_conditional: bool = False  # whether the coverage is promised for each class
    accuracy: float | None = None  # wanted of predictions that are not rejected
    certainty: float = 0.95  # of that promise
    familiarity: float = 0.0  # images below are rejected; that share of known images is among them

    def __post_init__(self) -> None:
        for name in ("coverage", "accuracy", "certainty", "familiarity"):
            share = getattr(self, name)
            may_be = (name == "accuracy" and share is None) or (name == "familiarity" and not share)
            if not may_be and not (isinstance(share, int | float) and 0 < share < 1):
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
class Decided:
    """What is decided about some images."""

    sets: NDArray[np.bool_]  # (images, classes)
    rejected: NDArray[np.bool_] | None  # (images,); None where nothing was to be rejected
    familiarity: Floats  # (images,)


@dataclass(frozen=True, eq=False)
class Decisions:
    """The validation images' scores, by which others are judged."""

    sets: ScoreTable
    rejection: RejectionTable
    familiarity: FamiliarityTable
    reference: Reference
    _thresholds: dict[tuple[float, float], float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, probabilities: _Array, logits: _Array, labels: Ints) -> "Decisions":
        """Return the scores of images that the calibration was not fitted on.

        Args:
            probabilities: calibrated, (images, classes).
            logits: (images, classes), times the temperature that they were divided by.
            labels: (images,) columns.
        """
        # As graphs return them: thresholds are compared with float32
        probabilities = probabilities.astype(np.float32)
        best, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        penalty = choose_penalty(probabilities, labels)
        return cls(
            ScoreTable.of(probabilities, labels, penalty),
            RejectionTable(confidence, best == labels),
            FamiliarityTable(negative_energy(logits)),
            Reference.of(confidence, best, probabilities.shape[1]),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all tables as arrays of one axis, as a bundle stores them."""
        found: dict[str, NDArray[Any]] = {}
        for part in _PARTS:
            own = getattr(self, part).arrays()
            found |= {f"{part}.{name}": np.ascontiguousarray(a) for name, a in own.items()}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], classes: int) -> "Decisions":
        """Return what `arrays` was called on, for a bundle of that many classes.

        Raises:
            BundleError: an array is missing or cannot be one of a table.
        """
        parts = {
            part: {
                name.removeprefix(f"{part}."): array
                for name, array in arrays.items()
                if name.startswith(f"{part}.")
            }
            for part in _PARTS
        }
        try:
            sets = ScoreTable.from_arrays(parts["sets"])
            reference = Reference.from_arrays(parts["reference"])
            if sets.labels.max() >= classes or len(reference.class_shares) != classes:
                raise ValueError(f"they are not of {classes} classes")
            rejection = RejectionTable.from_arrays(parts["rejection"])
            familiarity = FamiliarityTable.from_arrays(parts["familiarity"])
            counts = {*map(len, (sets.labels, rejection.confidence, familiarity.scores))}
            if counts != {reference.images}:
                raise ValueError(f"of {reference.images} images, came scores of {sorted(counts)}")
            return cls(sets, rejection, familiarity, reference)
        except (KeyError, ValueError) as cause:
            raise BundleError(f"the scores of its validation images: {cause}") from cause

    @property
    def images(self) -> int:
        """How many images they are of."""
        return self.reference.images

    def check(self, options: DecisionOptions) -> None:
        """Make sure that what is wanted can be had.

        Raises:
            ConfigError: no threshold promises the wanted accuracy, or the images are too few for
                so low a familiarity.
        """
        self.threshold(options)
        least = 1 / (self.images + 1)
        if 0 < options.familiarity <= least:
            raise ConfigError(
                f"familiarity {options.familiarity}: with {self.images} validation images none is "
                f"below {least:.2g}, so that nothing would be rejected; ask for more"
            )

    def threshold(self, options: DecisionOptions) -> float | None:
        """Return the confidence below which predictions are rejected; None where none are.

        Raises:
            ConfigError: no threshold promises the wanted accuracy.
        """
        if options.accuracy is None:
            return None
        key = (options.accuracy, options.certainty)
        found = self._thresholds.get(key)
        if found is None:
            found = self.rejection.threshold(*key)
            if found is None:
                raise ConfigError(
                    f"accuracy {options.accuracy}: with the {self.images} validation images of the "
                    f"run it cannot be promised with a certainty of {options.certainty}; "
                    f"{self._most(options.certainty)}"
                )
            if len(self._thresholds) >= _CACHED:
                self._thresholds.clear()
            self._thresholds[key] = found
        return found

    def _most(self, certainty: float) -> str:
        """Return the highest accuracy that can be promised, in words."""
        for percent in range(99, 0, -1):
            if self.rejection.threshold(percent / 100, certainty) is not None:
                return f"the most is {percent / 100}, or tune with more validation images"
        return "tune with more validation images"

    def decide(self, probabilities: _Array, logits: _Array, options: DecisionOptions) -> Decided:
        """Return what is decided about images.

        Args:
            probabilities: calibrated, (images, classes).
            logits: (images, classes), times the temperature that they were divided by.
            options: what is wanted.

        Raises:
            ConfigError: no threshold promises the wanted accuracy.
        """
        own = options
        sets = self.sets.sets(probabilities, own.coverage, own.sets, own.class_conditional)
        familiarity = self.familiarity.p_value(negative_energy(logits))
        threshold = self.threshold(options)
        rejected = None
        if threshold is not None or own.familiarity > 0:
            rejected = familiarity < own.familiarity
            if threshold is not None:
                rejected = rejected | (probabilities.max(axis=1) < threshold)
        return Decided(sets, rejected, familiarity)

    def expected_reference(self, options: DecisionOptions) -> Reference:
        """Return the reference with the share of the validation images that would be rejected."""
        threshold, rate = self.threshold(options), None
        # Who is unsure is often unfamiliar too, so that the two shares cannot be put together.
        if threshold is not None and not options.familiarity:
            rate = self.rejection.expected_rejection(threshold)
        return replace(self.reference, rejection_rate=rate)


def partners(pairs: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[int, int]:
    """Return by predicted column the class that is most often taken for it."""
    place = {name: column for column, name in enumerate(class_names)}
    found: dict[int, tuple[int, int]] = {}
    for pair in pairs:
        column, other = place[pair["predicted"]], place[pair["true"]]
        count = int(pair.get("count", 1))
        if column not in found or count > found[column][0]:
            found[column] = (count, other)
    return {column: other for column, (_, other) in found.items()}
