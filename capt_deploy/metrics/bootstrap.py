"""Bootstrap intervals of metrics: how much a figure owes to which images happened to be there.

As many images are drawn as there are, with replacement, and measured again (Efron 1979). The
interval is that between two percentiles of these measurements, moved by what their mean differs
from the figure. Of accuracy, Brier and NLL that is nothing. But noise alone adds to an ECE, and a
drawn sample has it twice: unmoved, the interval may lie wholly above its figure. It is meant for
what the figure would be for other images, as many; how much of it is noise tells `calibrated_ece`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.metrics.bins import bin_of
from capt_deploy.metrics.calibration import brier_terms, combined, nll_terms
from capt_deploy.metrics.intervals import Interval
from capt_deploy.metrics.probabilities import Floats, Ints, Probabilities, require_both
from capt_deploy.metrics.top_labels import top_labels

Metric = Callable[[NDArray[Any], Ints], float]


def bootstrap_intervals(
    probabilities: Probabilities,
    labels: Ints,
    metrics: Mapping[str, Metric],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return low and high end of each metric's interval.

    Every metric sees the same draws. Each draw copies all probabilities; for what `all_metrics`
    returns, `metric_intervals` says the same sooner.

    Args:
        probabilities: (images, classes), rows sum to 1.
        labels: (images,) of columns.
        metrics: functions of both, by name.
        resamples: how often images are drawn.
        level: share of the measurements that are inside of the interval.
        seed: of the draws.

    Raises:
        ValueError: no resamples, a level outside 0-1, or what `metrics.all_metrics` refuses.
    """
    require_both(probabilities, labels)

    def measure(images: Ints) -> Iterable[float]:
        own, truth = probabilities[images], labels[images]
        return [metric(own, truth) for metric in metrics.values()]

    ends = _ends(measure, len(labels), resamples, level, seed)
    return dict(zip(metrics, ends, strict=True))


def metric_intervals(
    probabilities: Probabilities,
    labels: Ints,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return `bootstrap_intervals` of all that `all_metrics` returns but `n`.

    What is drawn are figures of each image instead of its probabilities.
    """
    require_both(probabilities, labels)
    top, classwise = top_labels(probabilities, labels), _Classwise(probabilities, labels)
    briers, nlls = brier_terms(probabilities, labels), nll_terms(probabilities, labels)

    def measure(images: Ints) -> dict[str, float]:
        return combined(top[images], classwise.error(images), briers[images], nlls[images])

    names = measure(np.arange(len(labels))).keys()
    ends = _ends(lambda images: measure(images).values(), len(labels), resamples, level, seed)
    return dict(zip(names, ends, strict=True))


def _ends(
    measure: Callable[[Ints], Iterable[float]], images: int, resamples: int, level: float, seed: int
) -> list[Interval]:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected at least one resample and a level between 0 and 1, "
            f"came {resamples} and {level}"
        )
    random = np.random.default_rng(seed)
    figures = np.array(list(measure(np.arange(images))))
    drawn = np.array([list(measure(random.integers(0, images, images))) for _ in range(resamples)])
    ends: Floats = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    moved = ends + figures - drawn.mean(axis=0)
    # No share is moved out of 0-1; what is none says so by its figures.
    least, most = np.minimum(drawn.min(axis=0), 0), np.maximum(drawn.max(axis=0), 1)
    low, high = np.clip(moved, least, most)
    low, high = np.minimum(low, figures), np.maximum(high, figures)  # whatever rounding does
    return list(zip(low.tolist(), high.tolist(), strict=True))


class _Classwise:
    """The classwise calibration error of drawn images.

    Nearly all probabilities are in the first bin; a product of matrices sums these. The few others
    are kept as a list.
    """

    def __init__(self, probabilities: Probabilities, labels: Ints, bins: int = 15) -> None:
        images, self.classes = probabilities.shape
        self.bins = bins
        gaps = -probabilities.astype(np.float64)
        gaps[np.arange(images), labels] += 1
        inside = bin_of(probabilities, bins)
        self.image, column = inside.nonzero()
        self.cell = column * bins + inside[self.image, column]
        self.gap = gaps[self.image, column]
        gaps[self.image, column] = 0
        self.first = gaps

    def error(self, images: Ints) -> float:
        """Return it for (n,) images, which may come more than once."""
        times = np.bincount(images, minlength=len(self.first)).astype(np.float64)
        gaps = np.zeros(self.classes * self.bins)
        gaps[:: self.bins] = times @ self.first
        gaps += np.bincount(self.cell, self.gap * times[self.image], len(gaps))
        return float(np.abs(gaps).sum() / self.classes / len(images))
