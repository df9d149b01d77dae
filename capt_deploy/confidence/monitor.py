"""What a classifier says in use, compared with what it said on images of its own world.

What is counted is never forgotten: call `reset` from time to time, or what shifts after a million
images takes a million more to show.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stability import SHIFTED, WATCH, Comparison, compare
from capt_deploy.confidence.stored_arrays import Arrays, vector
from capt_deploy.metrics.calibration import Floats, Ints

# Narrower at the top, where most confidences of a good classifier are.
CONFIDENCE_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_INNER_EDGES = np.array(CONFIDENCE_EDGES[1:-1])
_BINS = len(CONFIDENCE_EDGES) - 1
Verdict = Literal["no reference", "too few images", "steady", "watch", "shifted"]


def confidence_counts(confidence: NDArray[np.floating]) -> Ints:
    """Return how many confidences lie in each bin, (bins,); a bin holds its lower edge."""
    bins = np.searchsorted(_INNER_EDGES, confidence, "right")
    return np.bincount(bins, minlength=_BINS)


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Reference:
    """What to expect: shares among images of the classifier's own world."""

    confidence_histogram: Floats  # (bins,) shares between `CONFIDENCE_EDGES`
    class_shares: Floats  # (classes,) of the predicted classes
    rejection_rate: float | None  # None where nothing is rejected
    images: int

    def __post_init__(self) -> None:
        for name in ("confidence_histogram", "class_shares"):
            shares = getattr(self, name)
            if shares.ndim != 1 or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
                raise ValueError(f"{name}: expected shares that sum to 1, came {shares}")
        if len(self.confidence_histogram) != _BINS or self.images < 1:
            raise ValueError(
                f"expected {_BINS} bins of at least 1 image, "
                f"came {len(self.confidence_histogram)} of {self.images}"
            )
        if self.rejection_rate is not None and not 0 <= self.rejection_rate <= 1:
            raise ValueError(f"expected a rejection rate in 0-1, came {self.rejection_rate}")

    @classmethod
    def of(
        cls,
        confidence: NDArray[np.floating],
        predicted: Ints,
        classes: int,
        rejection_rate: float | None = None,
    ) -> "Reference":
        """Return the reference of images, (images,) confidences and predicted columns.

        Raises:
            ValueError: no images, NaN, or a predicted column that is no class.
        """
        bins, counts = _counts(confidence, predicted)
        images = len(confidence)
        if not images or len(counts) > classes:
            raise ValueError(
                f"expected images of {classes} classes, came {images} of {len(counts)} or more"
            )
        return cls(bins / images, _padded(counts, classes) / images, rejection_rate, images)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the reference as arrays of one axis, as a bundle stores it."""
        arrays: dict[str, NDArray[Any]] = {
            "confidence_histogram": self.confidence_histogram,
            "class_shares": self.class_shares,
            "images": np.array([self.images]),
        }
        if self.rejection_rate is not None:
            arrays["rejection_rate"] = np.array([self.rejection_rate])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Reference":
        """Return the reference that `arrays` was called on.

        Raises:
            ValueError: an array is missing, or cannot be one of a reference.
        """
        stored = "rejection_rate" in arrays
        return cls(
            vector(arrays, "confidence_histogram", "f", _BINS),
            vector(arrays, "class_shares", "f"),
            float(vector(arrays, "rejection_rate", "f", 1)[0]) if stored else None,
            int(vector(arrays, "images", "i", 1)[0]),
        )


@dataclass(frozen=True)
class MonitorSummary:
    """What a monitor has seen up to one moment."""

    images: int
    confidence_counts: tuple[int, ...]  # between `CONFIDENCE_EDGES`
    class_counts: dict[str, int]
    confidence: Comparison | None  # None without a reference or images
    classes: Comparison | None  # among the images of the reference's classes
    rejection_rate: float | None  # None where nothing is rejected
    expected_rejection_rate: float | None
    verdict: Verdict

    @property
    def confidence_psi(self) -> float | None:
        """The population stability index of the confidences."""
        return None if self.confidence is None else self.confidence.psi

    @property
    def class_psi(self) -> float | None:
        """The population stability index of the predicted classes."""
        return None if self.classes is None else self.classes.psi

    def to_dict(self) -> dict[str, Any]:
        """Return the summary's JSON form."""
        return asdict(self) | {"confidence_edges": CONFIDENCE_EDGES}

    def __str__(self) -> str:
        parts = [f"{self.verdict} ({self.images} images so far)"]
        if self.confidence is not None:
            parts.append(f"confidence {self.confidence}")
        if self.classes is not None:
            parts.append(f"predicted classes {self.classes}")
        if self.rejection_rate is not None:
            parts.append(f"{self.rejection_rate:.1%} rejected")
            if self.expected_rejection_rate is not None:
                parts[-1] += f", expected {self.expected_rejection_rate:.1%}"
        return "; ".join(parts)


class Monitor:
    """Counts predictions, in memory that does not grow with them. Thread-safe."""

    def __init__(self, reference: Reference | None, class_names: Sequence[str]) -> None:
        self.reference = reference
        self._names = tuple(class_names)
        self._lock = Lock()
        self._bins = np.zeros(_BINS, np.int64)
        self._classes = np.zeros(len(self._names), np.int64)
        self._decided = self._rejected = 0

    def observe(
        self,
        confidence: NDArray[np.floating],
        predicted: Ints,
        rejected: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count images.

        Args:
            confidence: (images,) in 0-1.
            predicted: (images,) columns; those of classes added since are welcome.
            rejected: (images,), or None where nothing is.

        Raises:
            ValueError: other shapes, NaN, or a negative column; nothing is counted then.
        """
        bins, classes = _counts(confidence, predicted)
        if rejected is not None and rejected.shape != confidence.shape:
            raise ValueError(f"expected {confidence.shape} rejected, came {rejected.shape}")
        with self._lock:
            self._bins += bins
            self._classes = _padded(self._classes, len(classes))
            self._classes[: len(classes)] += classes
            if rejected is not None:
                self._decided += len(rejected)
                self._rejected += int(np.count_nonzero(rejected))

    def extend(self, class_names: Sequence[str]) -> None:
        """Take over the names of all classes, once some were added."""
        with self._lock:
            self._names = tuple(class_names)

    def reset(self) -> None:
        """Forget all images."""
        with self._lock:
            self._bins[:] = 0
            self._classes[:] = 0
            self._decided = self._rejected = 0

    def summary(self) -> MonitorSummary:
        """Return what was counted up to now, and how it compares with the reference."""
        with self._lock:
            bins, classes, names = self._bins.copy(), self._classes.copy(), self._names
            decided, rejected = self._decided, self._rejected
        reference, images = self.reference, int(bins.sum())
        confidence = own = expected = None
        if reference is not None:
            shares, expected = reference.class_shares, reference.rejection_rate
            confidence = compare(bins, reference.confidence_histogram, reference.images)
            known = _padded(classes, len(shares))[: len(shares)]
            own = compare(known, shares, reference.images)
        names += tuple(f"class {index}" for index in range(len(names), len(classes)))
        counted = map(int, _padded(classes, len(names)))
        return MonitorSummary(
            images,
            tuple(map(int, bins)),
            dict(zip(names, counted, strict=True)),
            confidence,
            own,
            rejected / decided if decided else None,
            expected,
            _verdict(reference, images, [part for part in (confidence, own) if part is not None]),
        )


def _counts(confidence: NDArray[np.floating], predicted: Ints) -> tuple[Ints, Ints]:
    if confidence.ndim != 1 or confidence.shape != predicted.shape or np.isnan(confidence).any():
        raise ValueError(
            f"expected (images,) confidences without NaN and as many predicted columns, "
            f"came {confidence.shape} and {predicted.shape}"
        )
    return confidence_counts(confidence), np.bincount(predicted)


def _padded(counts: Ints, length: int) -> Ints:
    """Return counts with zeros for the classes of `length` that they do not reach."""
    missing = length - len(counts)
    return np.pad(counts, (0, missing)) if missing > 0 else counts


def _verdict(
    reference: Reference | None, images: int, comparisons: Sequence[Comparison]
) -> Verdict:
    """Return the worst of them.

    None is steady while images are fewer than in the reference and chance could still hide a shift.
    """
    if reference is None:
        return "no reference"
    found = {comparison.verdict for comparison in comparisons}
    if "shifted" in found:
        return "shifted"
    if "watch" in found:
        return "watch"
    chance = max((comparison.chance for comparison in comparisons), default=0.0)
    # With few images in the reference, chance may hide a shift for ever.
    blunt = chance > SHIFTED or (chance > WATCH and images < reference.images)
    return "too few images" if not images or blunt else "steady"
