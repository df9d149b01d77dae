"""Choose a calibrator (METHOD 8): the simplest of those that explain other images best."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate.label_noise import fit_temperature_to_noisy_labels
from capt_train.calibrators import CALIBRATORS

_FOLDS = 5
_Array = NDArray[np.floating]


@dataclass(frozen=True)
class CalibrationChoice:
    """The chosen calibration, and how all candidates did."""

    calibration: Calibration
    # By calibrator: `nll` of images that it was not fitted on; `behind`, its difference from the
    # lowest `nll`; and `error`, the standard error of that difference
    candidates: Mapping[str, Mapping[str, float]]


def candidates(setting: str | None, *, all_classes: bool) -> list[str]:
    """Return the names of the calibrators to choose from, simple ones first.

    Args:
        setting: name of one; None for all that are suitable.
        all_classes: whether the images are of all classes of the data set.
    """
    if setting is not None:
        return [setting]
    return [c.name for c in CALIBRATORS.values() if all_classes or not c.needs_all_classes]


def choose_calibration(
    raw: _Array, labels: Ints, names: Sequence[str] | None = None
) -> CalibrationChoice:
    """Fit the simplest calibrator with a cross-validated NLL within one standard error of the best.

    The error is that of the difference, image by image (ours): what makes images hard for all
    candidates says nothing about which is better. Calibrators that need more images are left out,
    and those that need all classes where there are fewer images than classes.

    Args:
        raw: scaled logits z, (images, classes), of images that were not tuned on.
        labels: (images,) columns.
        names: of the candidates, simple ones first; by default all calibrators.
    """
    names = names or [*CALIBRATORS]

    def enough(name: str) -> bool:
        calibrator = CALIBRATORS[name]
        classes = raw.shape[1] if calibrator.needs_all_classes else 0
        return len(labels) >= max(calibrator.fewest_images, classes)

    compared = list(filter(enough, names)) or names[:1]
    if len(compared) == 1:
        return CalibrationChoice(fit_calibration(compared[0], raw, labels), {})
    losses = {name: _held_out_losses(name, raw, labels) for name in compared}
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    figures = {}
    for name, loss in losses.items():
        behind = loss - best
        figures[name] = {
            "nll": float(loss.mean()),
            "behind": float(behind.mean()),
            "error": float(behind.std(ddof=1) / len(loss) ** 0.5),
        }
    chosen = next(name for name, f in figures.items() if f["behind"] <= f["error"])
    return CalibrationChoice(fit_calibration(chosen, raw, labels), figures)


def fit_calibration(name: str, raw: _Array, labels: Ints, label_noise: float = 0.0) -> Calibration:
    """Fit one calibrator.

    Args:
        name: of the calibrator.
        raw: scaled logits z, (images, classes).
        labels: (images,) columns.
        label_noise: share of wrong labels. With any, only a temperature is fitted: anything more
            would learn what the wrong labels look like.
    """
    if label_noise:
        return fit_temperature_to_noisy_labels(raw, labels, label_noise)
    module = import_module(CALIBRATORS[name].module or f"capt_train.calibrate.{name}")
    fit: Callable[[Floats, Ints], Calibration] = module.fit
    return replace(fit(np.asarray(raw, np.float64), labels), calibrator=name)


def cross_fitted(
    name: str, raw: _Array, labels: Ints, label_noise: float = 0.0
) -> Iterator[tuple[Ints, Calibration]]:
    """Yield the rows of each fold, and the calibration fitted on all other rows."""
    folds = _folds(labels)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        yield np.flatnonzero(held), fit_calibration(name, raw[~held], labels[~held], label_noise)


def _held_out_losses(name: str, raw: _Array, labels: Ints) -> Floats:
    losses = np.zeros(len(labels))
    for rows, calibration in cross_fitted(name, raw, labels):
        _, probabilities = calibration.apply(raw[rows])
        likelihoods = probabilities[np.arange(len(rows)), labels[rows]]
        losses[rows] = -np.log(np.maximum(likelihoods, np.finfo(np.float64).tiny))
    return losses


def _folds(labels: Ints) -> Ints:
    """Return the fold of each image, so that the images of a class lie in as many as possible."""
    order = np.argsort(labels, kind="stable")
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % min(_FOLDS, len(labels))
    return folds
