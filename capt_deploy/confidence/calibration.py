"""Calibration: turn a model's scaled logits into probabilities that can be trusted (METHOD 8).

One value holds all that may be fitted, in the three steps in which a graph applies it:

1. `scale`: vector scaling and temperature, (a_c·z_c + b_c)/T (Guo et al., arXiv 1706.04599);
2. `weigh`: distance-aware calibration, DAC (arXiv 2402.04655), which multiplies an image's logits
   by the factor γ of its most probable class;
3. `probabilities`: a monotone map of the log-odds of the most probable class (Gupta & Ramdas, arXiv
   2107.08353), followed by the softmax. Logits do not contain it.

Steps 2 and 3 never change which class is most probable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.calibration import softmax
from capt_deploy.metrics.probabilities import Floats

Array = NDArray[np.floating]
NONE = "none"  # calibrator of a model that could not be calibrated
DISTANCE_AWARE = "distance_aware"  # key in the manifest of a graph that contains DAC factors
LEAD = 1e-3  # by which the most probable class stays ahead of the second one in step 3
LARGEST = 1e9  # number of a calibration, with which float32 can still calculate
_BLOCK = 1 << 20  # numbers changed at once, which bounds the memory
NEGLIGIBLE = -1e9  # a logit that adds nothing to a sum of exponentials


@dataclass(frozen=True)
class VectorScaling:
    """A factor and an offset for the logit of each class, applied before the temperature."""

    scales: tuple[float, ...]  # a_c > 0
    biases: tuple[float, ...]  # b_c

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.biases):
            raise ValueError("vector scaling: expected as many biases as scales")
        scaled = all(1 / LARGEST <= scale <= LARGEST for scale in self.scales)
        if not scaled or not all(abs(bias) <= LARGEST for bias in self.biases):
            raise ValueError(
                f"vector scaling: expected finite numbers up to {LARGEST:g}, and scales above 0"
            )


@dataclass(frozen=True)
class TopLabelMap:
    """A monotone, piecewise linear map of the log-odds ℓ = log(p/(1−p)) of the top label."""

    positions: tuple[float, ...]  # of the knots, ascending; at least one
    values: tuple[float, ...]  # at the knots, never falling
    below: float  # slope before the first knot, 0 or more
    above: float  # slope after the last knot, 0 or more

    def __post_init__(self) -> None:
        numbers = (*self.positions, *self.values, self.below, self.above)
        if not self.positions or len(self.positions) != len(self.values):
            raise ValueError("top-label map: expected as many values as positions, at least one")
        if not all(isinstance(n, int | float) and abs(n) <= LARGEST for n in numbers):
            raise ValueError(f"top-label map: expected finite numbers up to {LARGEST:g}")
        if (np.diff(self.positions) <= 0).any() or (np.diff(self.values) < 0).any():
            raise ValueError("top-label map: expected rising positions, and values that never fall")
        if min(self.below, self.above) < 0:
            raise ValueError("top-label map: expected slopes of 0 or more")

    def __call__(self, log_odds: Array) -> Floats:
        """Return the mapped log-odds ℓ', in the shape of `log_odds`."""
        odds = np.asarray(log_odds, np.float64)
        inside = np.interp(odds, self.positions, self.values)
        before = self.below * np.minimum(odds - self.positions[0], 0)
        return np.asarray(inside + before + self.above * np.maximum(odds - self.positions[-1], 0))

    def shift(self, logits: Array) -> Floats:
        """Return logits (images, classes) whose softmax has the mapped top probability.

        The top logit rises by ℓ' − ℓ, but stays at least LEAD above the second one.
        """
        shifted = logits.astype(np.float64)
        top, second, rest = _split_top(shifted)
        rows = np.arange(len(shifted))
        odds = shifted[rows, top] - rest
        shifted[rows, top] = np.maximum(self(odds) + rest, second + LEAD)
        return shifted


def top_log_odds(logits: Array) -> Floats:
    """Return log(p/(1−p)) of each image's most probable class, (images,)."""
    exact = logits.astype(np.float64)
    top, _, rest = _split_top(exact)
    return np.asarray(exact[np.arange(len(exact)), top] - rest)


def _split_top(logits: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return the most probable class, and the maximum and log Σ exp of all other logits."""
    top = logits.argmax(axis=1)
    remaining = logits.copy()
    remaining[np.arange(len(logits)), top] = NEGLIGIBLE
    second = remaining.max(axis=1)
    rest = second + np.log(np.exp(remaining - second[:, np.newaxis]).sum(axis=1))
    return top, second, rest


@dataclass(frozen=True)
class Calibration:
    """A temperature, and whatever else calibrates the logits of a model."""

    temperature: float = 1.0
    vector: VectorScaling | None = None
    top_label: TopLabelMap | None = None
    factors: tuple[float, ...] | None = None  # γ_c > 0 of DAC, one for each class
    calibrator: str = "temperature"  # that fitted it; a bundle does not keep the name
    label_noise: float = 0.0  # share of the labels that were taken for wrong when it was fitted

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise ValueError(f"expected a temperature above 0, came {self.temperature}")
        if self.factors is not None and not all(0 < factor < inf for factor in self.factors):
            raise ValueError("expected factors of distance-aware calibration above 0")

    def apply(self, raw: Array) -> tuple[Floats, Floats]:
        """Return the calibrated logits and probabilities, both (images, classes).

        Args:
            raw: scaled logits z, (images, classes).
        """
        logits = self.weigh(self.scale(raw).astype(np.float64, copy=False))
        return np.asarray(logits, np.float64), self.probabilities(logits)

    def scale(self, raw: Array) -> Array:
        """Return (a·z + b)/T of scaled logits z, (images, classes)."""
        if self.vector is not None:
            scales, biases = self._scales_and_biases
            raw = raw * scales + biases
        return np.asarray(raw / self.temperature)

    def unscale(self, logits: Array) -> Array:
        """Return the scaled logits z from the result of `scale`."""
        raw = np.asarray(logits * self.temperature)
        if self.vector is None:
            return raw
        scales, biases = self._scales_and_biases
        return np.asarray((raw - biases) / scales)

    def weigh(self, logits: Array) -> Array:
        """Return logits (images, classes) times the factor of each image's most probable class."""
        return logits if self.factors is None else _times(logits, self._factors)

    def unweigh(self, logits: Array) -> Array:
        """Return the logits from the result of `weigh`."""
        return logits if self.factors is None else _times(logits, 1 / self._factors)

    def align(self, logits: Array, reference: Array) -> Array:
        """Return weighed logits, but with the factors that `reference` got for the same images.

        Where rounding makes another class the most probable one, all logits of the image jump by
        the ratio of two factors, and a comparison with `reference` would show nothing else.
        """
        if self.factors is None:
            return logits
        now, then = (self._factors[part.argmax(axis=1)] for part in (logits, reference))
        return np.asarray(logits * (then / now)[:, np.newaxis])

    def probabilities(self, logits: Array) -> Floats:
        """Return the probabilities of weighed logits, (images, classes)."""
        if self.top_label is None:
            return softmax(logits)
        probabilities = np.empty(logits.shape)
        step = max(1, _BLOCK // max(logits.shape[1], 1))
        for start in range(0, len(logits), step):
            block = slice(start, start + step)
            probabilities[block] = softmax(self.top_label.shift(logits[block]))
        return probabilities

    def select(self, places: Sequence[int] | NDArray[np.int64]) -> "Calibration":
        """Return the calibration of the classes at these places; later places get neutral values.

        The result is for logits that have a column for each place, in this order.
        """

        def pick(values: tuple[float, ...], neutral: float) -> tuple[float, ...]:
            return tuple(values[p] if p < len(values) else neutral for p in places)

        vector = self.vector and VectorScaling(
            pick(self.vector.scales, 1.0), pick(self.vector.biases, 0.0)
        )
        return replace(self, vector=vector, factors=self.factors and pick(self.factors, 1.0))

    @cached_property
    def _scales_and_biases(self) -> Floats:
        vector = self.vector or VectorScaling((), ())
        return np.array([vector.scales, vector.biases], np.float64)

    @cached_property
    def _factors(self) -> NDArray[np.float32]:
        return np.array(self.factors, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form of a run's `result.json`; it has no factors."""
        return {
            "kind": self.calibrator,
            "temperature": self.temperature,
            "vector": self.vector and asdict(self.vector),
            "top_label": self.top_label and asdict(self.top_label),
            "label_noise": self.label_noise,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Read the JSON form of a run's `result.json`.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        return cls(
            float(values["temperature"]),
            _read(VectorScaling, values["vector"]),
            _read(TopLabelMap, values["top_label"]),
            calibrator=str(values["kind"]),
            label_noise=float(values.get("label_noise", 0)),
        )

    def to_manifest(
        self, temperatures: Mapping[str, float], zero_shot_temperature: float | None
    ) -> dict[str, Any]:
        """Return the values of `calibration`, `top_label` and `vector_scaling` in `manifest.json`.

        Args:
            temperatures: by precision, for each graph may have another one.
            zero_shot_temperature: of the frozen model; None where images have other embeddings.
        """
        common: dict[str, Any] = {}
        if zero_shot_temperature is not None:
            common["zero_shot_temperature"] = zero_shot_temperature
        if self.factors is not None:
            common[DISTANCE_AWARE] = True
        return {
            "calibration": {name: {"temperature": t, **common} for name, t in temperatures.items()},
            "top_label": self.top_label,
            "vector_scaling": self.vector,
        }

    @classmethod
    def from_manifest(
        cls,
        entry: Mapping[str, float | bool],
        top_label: TopLabelMap | None,
        vector_scaling: VectorScaling | None,
    ) -> "Calibration":
        """Return the calibration of one graph from the values of `to_manifest`, without factors."""
        return cls(float(entry["temperature"]), vector_scaling, top_label, calibrator="")


UNCALIBRATED = Calibration(calibrator=NONE)


def _times(logits: Array, factors: Array) -> Array:
    return np.asarray(logits * factors[logits.argmax(axis=1)][:, np.newaxis])


def _read(kind: Any, values: Mapping[str, Any] | None) -> Any:
    if values is None:
        return None
    if unknown := set(values) - set(kind.__annotations__):
        raise ValueError(f"{kind.__name__}: unknown keys {sorted(unknown)}")
    numbers = {
        name: tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
        for name, value in values.items()
    }
    return kind(**numbers)
