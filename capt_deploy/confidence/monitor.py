"""Compare predictions in use with those for the validation images, and tell when they have shifted.

Two measures complete each other. A conformal test martingale, see `FamiliarityTest`, finds photos
of another kind within a few dozen. The population stability index finds other confidences and
another mixture of classes, also where each photo looks as familiar as before.

The second measure is the population stability index (PSI) of two sets of shares, Σ (a − e)·ln(a /
e). It is usually read as steady below 0.1 and as shifted above 0.25. But by chance alone, images of
the same distribution reach about (bins − 1)·(1/n + 1/m), for n images now and m before; it varies
like χ² with bins − 1 degrees of freedom, times (1/n + 1/m). So a PSI only counts above the value
that chance exceeds once in a thousand.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.stored_arrays import Arrays, read_array
from capt_deploy.metrics.probabilities import Floats, Ints

# Narrower at the top, where most confidences of a good classifier are.
CONFIDENCE_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_INNER_EDGES = np.array(CONFIDENCE_EDGES[1:-1])
_BINS = len(CONFIDENCE_EDGES) - 1
WATCH, SHIFTED = 0.1, 0.25  # PSI
ALARM = 100_000.0  # evidence of a `FamiliarityTest`: one false alarm in so many images, or fewer
_BETS = np.array([-1.0, 0.0, 1.0])  # on p-values that are too small, as they should be, too large
_CHANGES = 0.01  # share of the capital that changes its bet with every image
_MOST_EVIDENCE = 1e300
_ONCE_IN_A_THOUSAND = 3.09  # standard deviations that a normal variable exceeds so often
Verdict = Literal["no reference", "too few images", "steady", "watch", "shifted"]


class FamiliarityTest:
    """Bets that images in use are not as familiar as the calibration images; keeps the evidence.

    For each image, the p-value of its familiarity among those of the calibration images and of all
    images before it. While all come from one distribution, these p-values are independent and
    uniform, whatever the classifier. The Simple Jumper bets on p-values that lean to one side, and
    the Shiryaev–Roberts procedure R ← (R + 1)·gain keeps the evidence (Vovk et al.,
    arXiv 2102.10439): without a shift it takes at least c images on average until R reaches c.

    As images in use join those that others are compared with, a small difference never adds up to
    an alarm; and with fewer than about 50 calibration images no difference does.

    Args:
        images: number of calibration images, behind the familiarities.
    """

    def __init__(self, images: int) -> None:
        # images in use between the scores of the calibration images, from below all to above all
        self._counts = np.zeros(images + 1, np.int64)
        self._capital = np.full(len(_BETS), 1 / len(_BETS))
        self._evidence = 0.0
        self._draw = np.random.default_rng(0)
        self.highest = 0.0  # evidence so far

    def observe(self, familiarity: Floats) -> None:
        """Count (images,) familiarities, as `FamiliarityTable.p_value` returns them."""
        calibrated = len(self._counts) - 1
        places = np.rint(familiarity * (calibrated + 1)).astype(np.int64) - 1
        for place, tie in zip(places.tolist(), self._draw.random(len(places)), strict=True):
            lower, equal = int(self._counts[:place].sum()), int(self._counts[place])
            known = calibrated + int(self._counts.sum())
            p = (place + lower + tie * (equal + 1)) / (known + 1)
            self._counts[place] += 1
            capital = (1 - _CHANGES) * self._capital + _CHANGES * self._capital.mean()
            capital *= 1 + _BETS * (p - 0.5)
            gain = float(capital.sum())
            self._capital = capital / gain
            self._evidence = min((self._evidence + 1) * gain, _MOST_EVIDENCE)
            self.highest = max(self.highest, self._evidence)


@dataclass(frozen=True)
class Drift:
    """How far counts in use are from the shares expected."""

    psi: float
    chance: float  # PSI that images of the same distribution exceed once in a thousand

    @property
    def verdict(self) -> Literal["steady", "watch", "shifted"]:
        """Return how to read the PSI; steady includes what chance may explain."""
        if self.psi <= max(WATCH, self.chance):
            return "steady"
        return "watch" if self.psi <= SHIFTED else "shifted"

    def __str__(self) -> str:
        return f"PSI {self.psi:.2f} (by chance below {self.chance:.2f})"


def measure_drift(counts: Ints, shares: Floats, baseline_images: int) -> Drift | None:
    """Return how far (bins,) counts are from (bins,) shares; None where nothing was counted."""
    images = int(counts.sum())
    if not images:
        return None
    psi = population_stability_index(counts, shares, baseline_images)
    return Drift(psi, chance_limit(len(shares), images, baseline_images))


def chance_limit(bins: int, images: int, baseline_images: int) -> float:
    """Return the PSI that images of the same distribution exceed once in a thousand.

    By the approximation of the χ² distribution of Wilson & Hilferty (1931).
    """
    freedom = max(bins - 1, 1)
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + _ONCE_IN_A_THOUSAND * spread**0.5) ** 3
    return float(quantile * (1 / images + 1 / baseline_images))


def population_stability_index(counts: Ints, shares: Floats, baseline_images: int) -> float:
    """Return Σ (a − e)·ln(a / e), which is 0 where nothing has changed.

    Half an image is added to every bin on both sides, so that empty bins give no infinity.

    Args:
        counts: (bins,) of images in use.
        shares: (bins,) expected, e before anything is added.
        baseline_images: in which the shares were counted.
    """
    half = 0.5 * len(counts)
    observed = (counts + 0.5) / (counts.sum() + half)
    expected = (shares * baseline_images + 0.5) / (baseline_images + half)
    return float(((observed - expected) * np.log(observed / expected)).sum())


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class UsageBaseline:
    """Shares to expect in use, as counted on validation images."""

    confidence_histogram: Floats  # (bins,) shares between `CONFIDENCE_EDGES`
    class_shares: Floats  # (classes,) of the predicted classes
    images: int
    rejection_rate: float | None = None  # None where nothing is rejected

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
    def from_predictions(
        cls, confidence: NDArray[np.floating], predicted: Ints, classes: int
    ) -> "UsageBaseline":
        """Return the baseline of (images,) confidences and predicted columns.

        Raises:
            ValueError: no images, NaN, or a predicted column that is no class.
        """
        bins, counts = _counts(confidence, predicted)
        images = len(confidence)
        if not images or len(counts) > classes:
            raise ValueError(
                f"expected images of {classes} classes, came {images} of {len(counts)} or more"
            )
        return cls(bins / images, _padded(counts, classes) / images, images)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the baseline as arrays of one axis, for a bundle."""
        rate = {} if self.rejection_rate is None else {"rejection_rate": self.rejection_rate}
        return {
            "confidence_histogram": self.confidence_histogram,
            "class_shares": self.class_shares,
            "images": np.array([self.images]),
            **{name: np.array([value]) for name, value in rate.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "UsageBaseline":
        """Return the baseline from the result of `arrays`.

        Raises:
            ValueError: an array is missing, or does not belong to a baseline.
        """
        rate = read_array(arrays, "rejection_rate", "f", 1) if "rejection_rate" in arrays else None
        return cls(
            read_array(arrays, "confidence_histogram", "f", _BINS),
            read_array(arrays, "class_shares", "f"),
            int(read_array(arrays, "images", "i", 1)[0]),
            None if rate is None else float(rate[0]),
        )


@dataclass(frozen=True)
class MonitorSummary:
    """What a monitor has counted up to one moment."""

    images: int
    confidence_counts: tuple[int, ...]  # between `CONFIDENCE_EDGES`
    class_counts: dict[str, int]
    confidence: Drift | None  # None without a baseline or images
    classes: Drift | None  # among the images of the baseline's classes
    # Highest evidence since the last reset that images are less, or more, familiar than before:
    # `ALARM` is one. None where familiarity is not known
    evidence: float | None
    rejection_rate: float | None  # None where nothing is rejected
    expected_rejection_rate: float | None
    verdict: Verdict

    @property
    def confidence_psi(self) -> float | None:
        """Return the population stability index of the confidences."""
        return None if self.confidence is None else self.confidence.psi

    @property
    def class_psi(self) -> float | None:
        """Return the population stability index of the predicted classes."""
        return None if self.classes is None else self.classes.psi

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"confidence_edges": CONFIDENCE_EDGES}

    def __str__(self) -> str:
        parts = [f"{self.verdict} ({self.images} images so far)"]
        if self.confidence is not None:
            parts.append(f"confidence {self.confidence}")
        if self.classes is not None:
            parts.append(f"predicted classes {self.classes}")
        if self.evidence is not None:
            parts.append(f"evidence of another kind of photos {self.evidence:.3g}")
            parts[-1] += f" (alarm at {ALARM:,.0f})"
        if self.rejection_rate is not None:
            parts.append(f"{self.rejection_rate:.1%} rejected")
            if self.expected_rejection_rate is not None:
                parts[-1] += f", expected {self.expected_rejection_rate:.1%}"
        return "; ".join(parts)


class Monitor:
    """Counts predictions, in memory that does not grow with them. Thread-safe.

    Nothing is forgotten: call `reset` from time to time, or a shift after a million images takes a
    million more to show.
    """

    def __init__(self, baseline: UsageBaseline | None, class_names: Sequence[str]) -> None:
        self.baseline = baseline
        self._names = tuple(class_names)
        self._lock = Lock()
        self._bins = np.zeros(_BINS, np.int64)
        self._classes = np.zeros(len(self._names), np.int64)
        self._decided = self._rejected = 0
        self._test: FamiliarityTest | None = None

    def observe(
        self,
        confidence: NDArray[np.floating],
        predicted: Ints,
        rejected: NDArray[np.bool_] | None = None,
        familiarity: Floats | None = None,
    ) -> None:
        """Count images.

        Args:
            confidence: (images,) in 0-1.
            predicted: (images,) columns, also of classes that were added later.
            rejected: (images,), or None where nothing is rejected.
            familiarity: (images,) among the images of the baseline; None where it is not known.

        Raises:
            ValueError: other shapes, NaN, or a negative column; nothing is counted then.
        """
        bins, classes = _counts(confidence, predicted)
        for name, values in (("rejected", rejected), ("familiarity", familiarity)):
            if values is not None and values.shape != confidence.shape:
                raise ValueError(f"expected {confidence.shape} {name}, came {values.shape}")
        if familiarity is not None and not ((familiarity > 0) & (familiarity <= 1)).all():
            raise ValueError("expected familiarities above 0 and up to 1, came others")
        with self._lock:
            self._bins += bins
            self._classes = _padded(self._classes, len(classes))
            self._classes[: len(classes)] += classes
            if rejected is not None:
                self._decided += len(rejected)
                self._rejected += int(np.count_nonzero(rejected))
            if familiarity is not None and self.baseline is not None:
                self._test = self._test or FamiliarityTest(self.baseline.images)
                self._test.observe(familiarity)

    def extend(self, class_names: Sequence[str]) -> None:
        """Use these names of all classes, now that some were added."""
        with self._lock:
            self._names = tuple(class_names)

    def reset(self) -> None:
        """Forget all images."""
        with self._lock:
            self._bins[:] = 0
            self._classes[:] = 0
            self._decided = self._rejected = 0
            self._test = None

    def summary(self) -> MonitorSummary:
        """Return the counts up to now, and how far they are from the baseline."""
        with self._lock:
            bins, classes, names = self._bins.copy(), self._classes.copy(), self._names
            decided, rejected = self._decided, self._rejected
            evidence = None if self._test is None else self._test.highest
        baseline, images = self.baseline, int(bins.sum())
        confidence = class_drift = expected = None
        if baseline is not None:
            shares, expected = baseline.class_shares, baseline.rejection_rate
            confidence = measure_drift(bins, baseline.confidence_histogram, baseline.images)
            known = _padded(classes, len(shares))[: len(shares)]
            class_drift = measure_drift(known, shares, baseline.images)
        names += tuple(f"class {index}" for index in range(len(names), len(classes)))
        counted = map(int, _padded(classes, len(names)))
        drifts = [drift for drift in (confidence, class_drift) if drift is not None]
        return MonitorSummary(
            images,
            tuple(map(int, bins)),
            dict(zip(names, counted, strict=True)),
            confidence,
            class_drift,
            evidence,
            rejected / decided if decided else None,
            expected,
            "shifted" if (evidence or 0) >= ALARM else _verdict(baseline, images, drifts),
        )


def _counts(confidence: NDArray[np.floating], predicted: Ints) -> tuple[Ints, Ints]:
    """Return the images in each bin of confidence, (bins,), and of each predicted class."""
    if confidence.ndim != 1 or confidence.shape != predicted.shape or np.isnan(confidence).any():
        raise ValueError(
            f"expected (images,) confidences without NaN and as many predicted columns, "
            f"came {confidence.shape} and {predicted.shape}"
        )
    bins = np.searchsorted(_INNER_EDGES, confidence, "right")
    return np.bincount(bins, minlength=_BINS), np.bincount(predicted)


def _padded(counts: Ints, length: int) -> Ints:
    """Return counts with zeros behind them, for at least `length` classes."""
    missing = length - len(counts)
    return np.pad(counts, (0, missing)) if missing > 0 else counts


def _verdict(baseline: UsageBaseline | None, images: int, drifts: Sequence[Drift]) -> Verdict:
    """Return the worst verdict; never steady while few images could still hide a shift."""
    if baseline is None:
        return "no reference"
    verdicts = {drift.verdict for drift in drifts}
    if "shifted" in verdicts:
        return "shifted"
    if "watch" in verdicts:
        return "watch"
    chance = max((drift.chance for drift in drifts), default=0.0)
    # With few images in the baseline, chance may hide a shift for ever.
    hidden = chance > SHIFTED or (chance > WATCH and images < baseline.images)
    return "too few images" if not images or hidden else "steady"
