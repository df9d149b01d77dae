"""Differences between a graph and the trained model, with a limit for each."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import exp, inf, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.base import Outputs
from capt_deploy.confidence.calibration import UNCALIBRATED, Calibration
from capt_deploy.core.console import table
from capt_deploy.metrics.calibration import (
    accuracy,
    expected_calibration_error,
    negative_log_likelihood,
    softmax,
)


@dataclass(frozen=True)
class Limits:
    """How far a graph may be from the trained model; shares in 0-1."""

    top1_agreement: float  # least share of images with the same most probable class
    max_logit_difference: float
    mean_logit_difference: float
    max_probability_difference: float
    embedding_cosine: float  # least of any image
    accuracy_difference: float
    ece_difference: float  # ECE-15
    nll_difference: float  # nats


# fp32: METHOD 9. The others are several times the differences of sound exports that
# benchmarks/export_matrix.py measures. A pixel mean that is wrong by 0.02 still fails fp16; int8's
# rounding would hide it, so the network is compared before it is quantized.
_INT8 = Limits(0.97, 1.5, 0.15, 0.25, 0.998, 0.01, 0.01, 0.03)
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(1.0, 1e-4, 1e-4, 1e-4, 1 - 1e-6, 0.0, 1e-4, 1e-4),
    "fp16": Limits(0.995, 0.2, 0.02, 0.05, 0.9999, 0.005, 0.005, 0.005),
    "bf16": Limits(0.98, 1.0, 0.1, 0.2, 0.998, 0.01, 0.01, 0.02),
    "int8": _INT8,
    "int8-cpu": _INT8,  # the same layers, the others in float32
}
# Divided by the root of the number of images. Rounding moves confidences across edges of bins: the
# ECE of 256 images differs between fp32 and int8 with a standard deviation of 0.17/√256.
_ECE_NOISE = {"fp16": 0.2, "bf16": 0.5, "int8": 0.5, "int8-cpu": 0.5}
_AT_LEAST = ("top1_agreement", "embedding_cosine")  # the others are at most their limit
_SHOWN = {
    "top1_agreement": "top-1 same",
    "max_logit_difference": "max |Δlogit|",
    "mean_logit_difference": "mean |Δlogit|",
    "embedding_cosine": "cosine ≥",
    "accuracy_difference": "Δaccuracy",
    "ece_difference": "ΔECE-15",
    "nll_difference": "ΔNLL",
}


@dataclass(frozen=True)
class GateResult:
    """Differences between the trained model and a graph as a backend runs it."""

    precision: str
    images: int
    labelled: int  # of the images; the last three figures are of these
    top1_agreement: float
    max_logit_difference: float
    mean_logit_difference: float
    max_probability_difference: float
    embedding_cosine: float
    accuracy_difference: float | None  # graph less model; None without labels
    ece_difference: float | None
    nll_difference: float | None

    @property
    def limits(self) -> Limits:
        """Return the limits in force, wider for few images in reduced precision.

        If the true agreement is the limit, in 95 of 100 cases no more images than allowed here get
        another class. The ECE of few images jumps whenever one of them changes its bin.
        """
        limits = LIMITS[self.precision]
        if self.precision == "fp32" or not self.images:
            return limits
        flipped = _allowed_flips(self.images, limits.top1_agreement) / self.images
        noise = _ECE_NOISE[self.precision] / self.images**0.5
        return replace(
            limits,
            top1_agreement=1 - flipped,
            accuracy_difference=max(limits.accuracy_difference, flipped),
            ece_difference=max(limits.ece_difference, noise),
        )

    @property
    def failures(self) -> list[str]:
        """Return the figures beyond their limits, in words; empty if the gate passes."""
        return [
            f"{name.replace('_', ' ')} {value:.5g}, expected at "
            f"{'least' if name in _AT_LEAST else 'most'} {limit:.5g}"
            for name, limit in asdict(self.limits).items()
            if (value := getattr(self, name)) is not None and not _holds(name, value, limit)
        ]

    @property
    def passed(self) -> bool:
        """Return whether everything is within its limit."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, limits included; figures that are not finite become None."""
        values = {
            name: value if not isinstance(value, float) or np.isfinite(value) else None
            for name, value in asdict(self).items()
        }
        return {
            **values,
            "limits": asdict(self.limits),
            "passed": self.passed,
            "failures": self.failures,
        }


def _holds(name: str, value: float, limit: float) -> bool:
    """Return whether a value is within its limit; NaN never is."""
    if name in _AT_LEAST:
        return value >= limit
    return abs(value) <= limit


def _allowed_flips(images: int, agreement: float) -> int:
    """Return the 95 % quantile of Binomial(images, 1 - agreement), at least 1."""
    odds, cumulative, count = log((1 - agreement) / agreement), 0.0, -1
    log_probability = images * log(agreement)  # of exactly `count` flips
    while cumulative < 0.95:
        count += 1
        cumulative += exp(log_probability)
        log_probability += log((images - count) / (count + 1)) + odds if count < images else -inf
    return max(1, count)


def compare_outputs(
    precision: str,
    expected: Outputs,
    outputs: Outputs,
    labels: NDArray[np.int64],
    calibration: Calibration = UNCALIBRATED,
) -> GateResult:
    """Return the differences between the outputs of a graph and those of the trained model.

    Args:
        precision: of the graph.
        expected: of the float32 torch model.
        outputs: of the graph, for the same images in the same order.
        labels: (images,) class of each image; -1 where it is not known.
        calibration: of the graph.
    """
    logits = outputs.logits
    same = logits.argmax(axis=1) == expected.logits.argmax(axis=1)
    logits = np.asarray(calibration.align(logits, expected.logits), np.float32)
    # Where rounding changes the most probable class, distance factor and top-label map jump.
    flipped = ~same[:, np.newaxis]
    probabilities = np.where(flipped, softmax(logits), outputs.probabilities)
    reference = np.where(flipped, softmax(expected.logits), expected.probabilities)
    difference = np.abs(logits - expected.logits)
    cosine = (outputs.embedding * expected.embedding).sum(axis=1)
    known = labels >= 0
    changes: tuple[float | None, ...] = (None, None, None)
    if known.any() and np.isfinite(outputs.logits).all():
        after, before = (
            part.probabilities[known].astype(np.float64) for part in (outputs, expected)
        )
        measures = (accuracy, expected_calibration_error, negative_log_likelihood)
        changes = tuple(m(after, labels[known]) - m(before, labels[known]) for m in measures)
    return GateResult(
        precision,
        len(labels),
        int(known.sum()),
        float(same.mean()),
        float(difference.max()),
        float(difference.mean()),
        float(np.abs(probabilities - reference).max()),
        float(cosine.min()),
        *changes,
    )


def gate_table(results: Mapping[str, GateResult]) -> str:
    """Return a table with the figures of each graph and its limits below."""
    rows = []
    for name, result in results.items():
        values = [getattr(result, field) for field in _SHOWN]
        limits = [getattr(result.limits, field) for field in _SHOWN]
        verdict = "passed" if result.passed else "FAILED"
        rows.append([name, str(result.images), *map(_short, values), verdict])
        rows.append(["  limit", "", *map(_short, limits), ""])
    return table(["graph", "images", *_SHOWN.values(), ""], rows)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}" if abs(value) >= 0.5 else f"{value:.1e}"
