"""The photos worth looking at: the worst that tuning recovered, left wrong, or broke."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import fsencode
from os.path import commonpath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import ImageError
from capt_deploy.core.text import printable
from capt_deploy.data.images import load_shrunk
from capt_deploy.evaluation.evaluate import Evaluation, SuspectPhoto
from capt_deploy.metrics.probabilities import Floats
from capt_deploy.report.measure import ZERO_SHOT, Predictions

_MOST_CARDS = 12
_MOST_CLASSES = 3
_SMALL = 96  # pixels of the longer side; up to that a photo is kept as it is
_LARGE = 192  # others are shrunk to this
_QUALITY = 80

TopClasses = Sequence[tuple[str, float]]  # name and probability, most probable first


@dataclass(frozen=True)
class Card:
    """One photo and what the models take it for."""

    file: str  # relative to the folder that all photos are in
    true: str
    top_classes: Mapping[str, TopClasses]  # by model; the true class is last if none of the first
    picture: str | None  # a data URL; None where the file cannot be read
    size: tuple[int, int] | None  # width and height of the picture, in pixels

    @property
    def is_small(self) -> bool:
        """Return whether the picture has the photo's own pixels."""
        return self.size is not None and max(self.size) <= _SMALL


@dataclass(frozen=True)
class CardGroup:
    """Photos of one kind, the worst of `images`."""

    title: str
    explanation: str
    images: int
    cards: Sequence[Card]


def make_gallery(evaluation: Evaluation, predictions: Predictions) -> list[CardGroup]:
    """Return groups of photos, the worst of each first; a group may be empty."""
    labels, name = predictions.labels, next(iter(evaluation.scores))
    right, sure = predictions.main.argmax(axis=1) == labels, predictions.main.max(axis=1)
    kinds: list[tuple[str, str, NDArray[np.bool_], Floats]] = [
        ("Wrong", "The most confident mistakes.", ~right, sure)
    ]
    if predictions.zero_shot is not None:
        before = predictions.zero_shot.argmax(axis=1) == labels
        was_sure = predictions.zero_shot.max(axis=1)
        confident = f"the most confident mistakes of {name}"
        kinds = [
            (
                "Recovered",
                f"Zero-shot is wrong and {name} right; the most confident mistakes of zero-shot.",
                ~before & right,
                was_sure,
            ),
            ("Still wrong", f"Both are wrong; {confident}.", ~before & ~right, sure),
            (
                "Newly broken",
                f"Zero-shot is right and {name} wrong; {confident}.",
                before & ~right,
                sure,
            ),
        ]
    files = short_names(evaluation.files)

    def card(row: int) -> Card:
        true = int(labels[row])
        models = {ZERO_SHOT: predictions.zero_shot, name: predictions.main}
        top_classes = {
            model: _top_classes(probabilities[row], true, evaluation.class_names)
            for model, probabilities in models.items()
            if probabilities is not None
        }
        picture, size = thumbnail(evaluation.files[row])
        return Card(files[row], evaluation.class_names[true], top_classes, picture, size)

    groups = [
        CardGroup(title, explanation, int(chosen.sum()), list(map(card, _worst(chosen, badness))))
        for title, explanation, chosen, badness in kinds
    ]
    return [*groups, _suspects(evaluation.suspects)] if evaluation.suspects else groups


def _suspects(photos: Sequence[SuspectPhoto]) -> CardGroup:
    shown = photos[:_MOST_CARDS]
    names = short_names([photo.file for photo in shown])
    cards = [
        Card(
            name,
            photo.label,
            {"a model that has not seen it": photo.shares},
            *thumbnail(photo.file),
        )
        for name, photo in zip(names, shown, strict=True)
    ]
    explanation = (
        "Photos of the run whose labels are probably wrong, the most suspect first. Correct them "
        "and tune again; capt-suspects lists all."
    )
    return CardGroup("Suspect labels", explanation, len(photos), cards)


def _worst(chosen: NDArray[np.bool_], badness: Floats) -> list[int]:
    rows = np.flatnonzero(chosen)
    return list(map(int, rows[np.argsort(-badness[rows], kind="stable")[:_MOST_CARDS]]))


def _top_classes(probabilities: Floats, true: int, class_names: Sequence[str]) -> TopClasses:
    first = np.argsort(-probabilities, kind="stable")[:_MOST_CLASSES].tolist()
    shown = first if true in first else [*first, true]
    return [(class_names[column], float(probabilities[column])) for column in shown]


def short_names(files: Sequence[Path]) -> list[str]:
    """Return the files relative to the folder that all are in, without the folders above it.

    Names that are no valid text get replacement characters.
    """
    try:
        root = commonpath([file.parent for file in files])
    except ValueError:  # on several drives, or only some are absolute
        return [_text(Path(*file.parts[-2:])) for file in files]
    return [_text(file.relative_to(root) if root else file) for file in files]


def _text(path: Path) -> str:
    return printable(fsencode(path.as_posix()).decode(errors="replace"))


def thumbnail(file: Path) -> tuple[str | None, tuple[int, int] | None]:
    """Return a small picture as a data URL, and its width and height; None if unreadable."""
    try:
        image, _ = load_shrunk(file, lambda size: (min(size[0], _LARGE), min(size[1], _LARGE)))
        rgb = image.convert("RGB")
    except (ImageError, ValueError, OSError):
        return None, None
    buffer = BytesIO()
    if max(rgb.size) <= _SMALL:
        kind = "png"
        rgb.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        rgb.thumbnail((_LARGE, _LARGE))
        rgb.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}", rgb.size
