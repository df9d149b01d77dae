"""What a report is made of: the answers of some models about the same labelled images."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.confidence.decisions import Decisions
from capt_deploy.confidence.top_label import TopLabelMap
from capt_deploy.confidence.vector_scaling import VectorScaling
from capt_deploy.core.errors import DataError
from capt_deploy.metrics.calibration import Ints

ZERO_SHOT = "zero-shot"
_UNPRINTABLE = ("Cc", "Cs")  # categories: control characters, halves of a character


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Answers:
    """What one model says of all images."""

    name: str  # "zero-shot", "tuned", "exported fp32", …
    # (images, classes), scaled and calibrated, but without the factors and the map below
    logits: NDArray[np.floating]
    temperature: float  # that `logits` have been divided by
    # (classes,) of distance-aware calibration; None without it
    factors: NDArray[np.floating] | None = None
    top_label: TopLabelMap | None = None  # of the most probable class
    vector: VectorScaling | None = None  # before the temperature


@dataclass(frozen=True, eq=False)
class ReportData:
    """Models measured on the same images, the zero-shot one first if there is one."""

    title: str
    files: Sequence[Path]  # one per image; may be unreadable by now
    labels: Ints  # (images,) of columns
    class_names: Sequence[str]
    tuned: Sequence[bool]  # per class: tuned on (base), or not (new)
    models: Sequence[Answers]
    pairs: Sequence[tuple[int, int]]  # mined: true class, class it is mistaken for
    provenance: Mapping[str, Any]  # nested, of what JSON can hold
    notes: Sequence[str] = ()
    decisions: Decisions | None = None  # of the main model, by its validation images

    @property
    def zero_shot(self) -> Answers | None:
        """The model that all others are compared with."""
        first = self.models[0]
        return first if first.name == ZERO_SHOT and len(self.models) > 1 else None

    @property
    def main(self) -> Answers:
        """The model that the page is about: the first that is not zero-shot, else the only one."""
        return self.models[0 if self.zero_shot is None else 1]


def checked(data: ReportData) -> ReportData:
    """Return the data with names that can be printed anywhere.

    Raises:
        DataError: logits, temperature or factors that no calibration gives.
        ValueError: no images, no models, or shapes and indices that do not fit together.
    """
    images, classes = len(data.labels), len(data.class_names)
    lengths = {"files": len(data.files), "labels": images}
    if not images or len(set(lengths.values())) > 1:
        raise ValueError(f"expected as many files as labels, at least one; came {lengths}")
    if len(data.tuned) != classes:
        raise ValueError(f"expected {classes} entries of `tuned`, came {len(data.tuned)}")
    indices = np.concatenate([data.labels, *(np.asarray(pair) for pair in data.pairs)])
    if indices.min() < 0 or indices.max() >= classes:
        raise ValueError(
            f"expected labels and pairs of {classes} classes, "
            f"came {indices.min()} to {indices.max()}"
        )
    names = [model.name for model in data.models]
    if not names or len(set(names)) < len(names) or ZERO_SHOT in names[1:]:
        raise ValueError(f"expected models of different names, zero-shot first; came {names}")
    for model in data.models:
        _check_answers(model, images, classes)
    return replace(
        data,
        title=printable(data.title),
        class_names=[printable(name) for name in data.class_names],
        pairs=[(int(true), int(taken)) for true, taken in data.pairs],
        models=[replace(model, name=printable(model.name)) for model in data.models],
        provenance=_printed(data.provenance),
        notes=[printable(note) for note in data.notes],
    )


def _printed(value: Any) -> Any:
    """Return a nested value with texts that can be printed."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printed(inner) for key, inner in value.items()}
    return list(map(_printed, value)) if isinstance(value, list | tuple) else value


def _check_answers(model: Answers, images: int, classes: int) -> None:
    if model.logits.shape != (images, classes):
        raise ValueError(
            f"{model.name}: expected logits of shape {(images, classes)}, came {model.logits.shape}"
        )
    if model.factors is not None and model.factors.shape != (classes,):
        raise ValueError(
            f"{model.name}: expected {classes} factors, came an array of {model.factors.shape}"
        )
    if model.factors is not None and not (np.isfinite(model.factors) & (model.factors > 0)).all():
        raise DataError(
            f"{model.name}: expected factors of distance-aware calibration above 0, "
            f"came {model.factors.min()} to {model.factors.max()}; export it anew"
        )
    wrong = int((~np.isfinite(model.logits)).any(axis=1).sum())
    if wrong or not (np.isfinite(model.temperature) and model.temperature > 0):
        raise DataError(
            f"{model.name}: expected finite logits and a positive temperature, came NaN or "
            f"infinity for {wrong} of {images} images, temperature {model.temperature}; "
            f"a model in half precision that overflows does so: export it as fp32"
        )


def printable(text: str) -> str:
    """Return text on one line, without what XML cannot hold."""
    return "".join(map(_printable, text))


def _printable(char: str) -> str:
    if char.isspace():
        return " "
    bad = unicodedata.category(char) in _UNPRINTABLE or char in "\ufffe\uffff"
    return "\N{REPLACEMENT CHARACTER}" if bad else char
