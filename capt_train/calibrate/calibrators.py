"""Choose how confidences are calibrated (METHOD 8): the simplest that explains other images best.

Candidates from simple to complex: a temperature; with it a line or a monotone map of the top
label's log-odds; vector scaling. Each is judged by the NLL of images that it was not fitted on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capt_deploy.confidence.top_label import TopLabelMap, probabilities_of, top_log_odds
from capt_deploy.confidence.vector_scaling import VectorScaling
from capt_deploy.metrics.calibration import Floats, Ints
from capt_train.calibrate.label_noise import fit_label_noise
from capt_train.calibrate.temperature import fit_temperature
from capt_train.calibrate.top_label import fit_isotonic, fit_line
from capt_train.calibrate.vector import fit_vector
from capt_train.parts import CALIBRATORS

NONE, TEMPERATURE, LINE, ISOTONIC, VECTOR = "none", *CALIBRATORS
KINDS = CALIBRATORS  # from simple to complex
_FOLDS = 5
_FEWEST = 50  # images that more than a temperature can be chosen by
_Array = NDArray[np.floating]


@dataclass(frozen=True)
class Calibration:
    """What turns scaled logits z into probabilities that can be believed."""

    temperature: float = 1.0
    vector: VectorScaling | None = None  # z becomes (a·z + b)/T
    top_label: TopLabelMap | None = None  # of what that makes most probable
    kind: str = TEMPERATURE
    label_noise: float = 0.0  # share of the labels that were taken for wrong when it was fitted

    def logits(self, raw: _Array) -> Floats:
        """Return calibrated logits (images, classes), without the top label's map."""
        scaled = raw if self.vector is None else self.vector.applied(raw)
        return np.asarray(scaled / self.temperature, np.float64)

    def probabilities(self, raw: _Array) -> Floats:
        """Return calibrated probabilities, (images, classes)."""
        return probabilities_of(self.logits(raw), self.top_label)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        vector, top_label = self.vector, self.top_label
        return {
            "kind": self.kind,
            "temperature": self.temperature,
            "vector": vector and {"scales": [*vector.scales], "biases": [*vector.biases]},
            "top_label": top_label and top_label.to_dict(),
            "label_noise": self.label_noise,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        vector, top_label = values["vector"], values["top_label"]
        kind, temperature = values["kind"], float(values["temperature"])
        if kind not in (NONE, *KINDS) or not 0 < temperature < float("inf"):
            raise ValueError(f"calibration: unknown kind or temperature: {values!r}")
        if (vector is None, top_label is None) != (kind != VECTOR, kind not in (LINE, ISOTONIC)):
            raise ValueError(f"calibration: not what {kind} consists of: {values!r}")
        if vector is not None:
            own = (tuple(map(float, vector[name])) for name in ("scales", "biases"))
            vector = VectorScaling(*own)
        own_map = None if top_label is None else TopLabelMap.from_dict(top_label)
        return cls(temperature, vector, own_map, kind, float(values.get("label_noise", 0)))


UNCALIBRATED = Calibration(kind=NONE)


@dataclass(frozen=True)
class Choice:
    """The calibration taken, and what all candidates cost."""

    calibration: Calibration
    # By kind: `nll` of images it was not fitted on; `behind`, by how much that is above the lowest
    # one, and `error`, the standard error of that difference
    candidates: Mapping[str, Mapping[str, float]]


def fit_calibration(kind: str, raw: _Array, labels: Ints, label_noise: float = 0.0) -> Calibration:
    """Fit one kind of calibration.

    Args:
        kind: one of KINDS.
        raw: scaled logits z, (images, classes).
        labels: (images,) columns.
        label_noise: share of wrong labels. With any, only a temperature is fitted: anything more
            would learn what the wrong ones look like.
    """
    wide = np.asarray(raw, np.float64)
    if label_noise:
        found = fit_label_noise(torch.from_numpy(wide), torch.tensor(labels), label_noise)
        return Calibration(found.temperature, label_noise=label_noise)
    if kind == VECTOR:
        scales, biases = fit_vector(wide, labels)
        vector = VectorScaling(tuple(scales.tolist()), tuple(biases.tolist()))
        return Calibration(_temperature(vector.applied(wide), labels), vector, None, kind)
    temperature = _temperature(wide, labels)
    if kind == TEMPERATURE:
        return Calibration(temperature)
    fit = {LINE: fit_line, ISOTONIC: fit_isotonic}[kind]
    own = fit(top_log_odds(wide / temperature), wide.argmax(axis=1) == labels)
    return Calibration(temperature, None, own, kind)


def choose_calibration(raw: _Array, labels: Ints, kinds: tuple[str, ...] = KINDS) -> Choice:
    """Fit the simplest candidate with a cross-validated NLL within one standard error of the best.

    The error is that of the difference, image by image (ours): what makes images hard for all
    candidates says nothing about which is better. Fewer than 50 images choose the first kind.

    Args:
        raw: scaled logits z, (images, classes), of images that were not tuned on.
        labels: (images,) columns.
        kinds: the candidates, simple ones first.
    """
    if len(labels) < _FEWEST or len(kinds) == 1:
        return Choice(fit_calibration(kinds[0], raw, labels), {})
    losses = {kind: _held_out_losses(kind, raw, labels) for kind in kinds}
    best = min(losses.values(), key=lambda own: float(own.mean()))
    candidates = {}
    for kind, own in losses.items():
        behind = own - best
        candidates[kind] = {
            "nll": float(own.mean()),
            "behind": float(behind.mean()),
            "error": float(behind.std(ddof=1) / len(own) ** 0.5),
        }
    chosen = next(kind for kind, c in candidates.items() if c["behind"] <= c["error"])
    return Choice(fit_calibration(chosen, raw, labels), candidates)


def cross_fitted(
    kind: str, raw: _Array, labels: Ints, label_noise: float = 0.0
) -> Iterator[tuple[Ints, Calibration]]:
    """Yield rows of images and a calibration of that kind that was fitted on all others."""
    folds = _folds(labels)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        yield np.flatnonzero(held), fit_calibration(kind, raw[~held], labels[~held], label_noise)


def _held_out_losses(kind: str, raw: _Array, labels: Ints) -> Floats:
    losses = np.zeros(len(labels))
    for rows, calibration in cross_fitted(kind, raw, labels):
        own = calibration.probabilities(raw[rows])[np.arange(len(rows)), labels[rows]]
        losses[rows] = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
    return losses


def _folds(labels: Ints) -> Ints:
    """Return the fold of each image, so that the images of a class lie in as many as possible."""
    order = np.argsort(labels, kind="stable")
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % min(_FOLDS, len(labels))
    return folds


def _temperature(logits: Floats, labels: Ints) -> float:
    return fit_temperature(torch.from_numpy(logits), torch.from_numpy(np.asarray(labels, np.int64)))
