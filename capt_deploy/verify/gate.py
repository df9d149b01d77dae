"""Whether a graph says what the trained model said: differences, and a limit for each.

The float32 torch model's answers travel in the bundle, so that any machine can ask its own backend
the same questions (`capt-export --check`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import exp, inf, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.confidence.distance_aware import aligned
from capt_deploy.core.console import table
from capt_deploy.metrics.calibration import (
    accuracy,
    expected_calibration_error,
    negative_log_likelihood,
    softmax,
)


@dataclass(frozen=True)
class Limits:
    """The most that a graph may differ; shares in 0-1."""

    top1_agreement: float  # the least share of images with the same most probable class
    max_logit_difference: float
    mean_logit_difference: float
    max_probability_difference: float
    embedding_cosine: float  # the least, of any image
    accuracy_difference: float
    ece_difference: float  # ECE-15
    nll_difference: float  # nats


# float32: METHOD 9. The others leave room for what their digits cost on a sound export, several
# times the figures of benchmarks/export_matrix.py. In float16 a mean that is wrong by 0.02 is still
# beyond them; where int8's rounding would hide it, the network is compared before it is lowered.
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(1.0, 1e-4, 1e-4, 1e-4, 1 - 1e-6, 0.0, 1e-4, 1e-4),
    "fp16": Limits(0.995, 0.2, 0.02, 0.05, 0.9999, 0.005, 0.005, 0.005),
    "bf16": Limits(0.98, 1.0, 0.1, 0.2, 0.998, 0.01, 0.01, 0.02),
    "int8": Limits(0.97, 1.5, 0.15, 0.25, 0.998, 0.01, 0.01, 0.03),
}
# Over the root of the number of images. Rounding moves confidences over edges of bins: between
# float32 and int8 of the photo model, the ECE of 256 images differs with a deviation of 0.17/√256.
_ECE_NOISE = {"fp16": 0.2, "bf16": 0.5, "int8": 0.5}
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
    """Differences between the trained model and a graph as a runtime runs it."""

    precision: str
    images: int
    labelled: int  # of them; the last three figures are of these
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
        """What is enforced: in reduced precision few images cannot be held to the share of many.

        As many may get another class as chance has it in 95 of 100 cases if the true agreement is
        the limit; the ECE of few images jumps whenever one changes its bin.
        """
        own = LIMITS[self.precision]
        if self.precision == "fp32" or not self.images:
            return own
        tipped = _may_tip(self.images, own.top1_agreement) / self.images
        return replace(
            own,
            top1_agreement=1 - tipped,
            accuracy_difference=max(own.accuracy_difference, tipped),
            ece_difference=max(own.ece_difference, _ECE_NOISE[self.precision] / self.images**0.5),
        )

    @property
    def failures(self) -> list[str]:
        """What is over its limit, in words; empty when the gate passes."""
        return [
            f"{name.replace('_', ' ')} {value:.3g}, limit {limit:.3g}"
            for name, limit in asdict(self.limits).items()
            if (value := getattr(self, name)) is not None and not _holds(name, value, limit)
        ]

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
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
    """Tell whether a value is within its limit; NaN never is."""
    if name in ("top1_agreement", "embedding_cosine"):
        return value >= limit
    return abs(value) <= limit


def _may_tip(images: int, agreement: float) -> int:
    """Return how many of some images may get another class if the true agreement is the limit.

    The 95 % quantile of the binomial distribution, but at least one.
    """
    odds, below, count = log((1 - agreement) / agreement), 0.0, -1
    logarithm = images * log(agreement)  # of the chance that just so many tip over
    while below < 0.95:
        count += 1
        below += exp(logarithm)
        logarithm += log((images - count) / (count + 1)) + odds if count < images else -inf
    return max(1, count)


def compare(
    precision: str,
    expected: Outputs,
    found: Outputs,
    labels: NDArray[np.int64],
    factors: NDArray[np.float32] | None = None,
) -> GateResult:
    """Return how far `found` is from `expected`.

    Args:
        precision: of the graph that gave `found`.
        expected: of the float32 torch model.
        found: of the graph, for the same images in the same order.
        labels: (images,) class of each image; -1 where it is not known.
        factors: (classes,) those of distance-aware calibration.
    """
    logits, probabilities = found.logits, found.probabilities
    same = logits.argmax(axis=1) == expected.logits.argmax(axis=1)
    if factors is not None:
        logits = aligned(logits, expected.logits, factors)
    # Where rounding tips an image over to another class, factors and the map of the top label jump.
    tipped = ~same[:, np.newaxis]
    probabilities, wanted = (
        np.where(tipped, softmax(part), own)
        for part, own in ((logits, probabilities), (expected.logits, expected.probabilities))
    )
    difference = np.abs(logits - expected.logits)
    cosine = (found.embedding * expected.embedding).sum(axis=1)
    known = labels >= 0
    changes: tuple[float | None, ...] = (None, None, None)
    if known.any() and np.isfinite(found.logits).all():
        own, reference = (
            part.probabilities[known].astype(np.float64) for part in (found, expected)
        )
        measures = (accuracy, expected_calibration_error, negative_log_likelihood)
        changes = tuple(m(own, labels[known]) - m(reference, labels[known]) for m in measures)
    return GateResult(
        precision,
        len(labels),
        int(known.sum()),
        float(same.mean()),
        float(difference.max()),
        float(difference.mean()),
        float(np.abs(probabilities - wanted).max()),
        float(cosine.min()),
        *changes,
    )


def gate_table(results: Mapping[str, GateResult]) -> str:
    """Return a line of figures for each graph, by name, with its limits below."""
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
