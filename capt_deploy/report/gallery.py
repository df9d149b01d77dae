"""The images worth looking at: the worst that tuning recovered, left wrong, or broke."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from os import fsencode
from os.path import commonpath
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import ImageError
from capt_deploy.data.images import load_shrunk
from capt_deploy.metrics.calibration import Floats
from capt_deploy.report.classes import Joint
from capt_deploy.report.data import ReportData, printable

_MOST = 12  # images of a group
_BARS = 3
SMALL = 96  # pixels of the longer side; up to that a photo is kept as it is
_LARGE = 192  # others are shrunk to this
_QUALITY = 80

Bars = Sequence[tuple[str, float]]
_Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class Card:
    """One image and what the models say of it; the most probable classes, the first first."""

    file: str  # as seen from the folder that all images are in
    true: str
    bars: dict[str, Bars]  # by model; the true class comes last where it is none of the first
    picture: str | None  # a data URL; None where the file cannot be read
    size: tuple[int, int] | None  # width and height of the picture, in pixels


@dataclass(frozen=True)
class Group:
    """Images of one kind, out of `images` such."""

    title: str
    what: str
    images: int
    cards: Sequence[Card]


def gallery(data: ReportData, found: Joint) -> list[Group]:
    """Return groups of images, the worst of each first; a group may have none."""
    names = short_names(data.files)
    return [
        Group(title, what, int(is_it.sum()), [_card(data, found, names, row) for row in rows])
        for title, what, is_it, badness in _kinds(data, found)
        for rows in [_worst(is_it, badness)]
    ]


def _kinds(data: ReportData, found: Joint) -> list[tuple[str, str, _Truths, Floats]]:
    """Return title, explanation, which images are of a kind, and how bad each one is."""
    after, sure = found.main.argmax(axis=1) == found.labels, found.main.max(axis=1)
    if found.zero_shot is None:
        return [("Wrong", "The most confident mistakes.", ~after, sure)]
    before, was_sure = (
        found.zero_shot.argmax(axis=1) == found.labels,
        found.zero_shot.max(axis=1),
    )
    name = data.main.name
    return [
        (
            "Recovered",
            f"Wrong by zero-shot, right by {name}; where zero-shot was most confident.",
            ~before & after,
            was_sure,
        ),
        ("Still wrong", f"Wrong by both; where {name} is most confident.", ~before & ~after, sure),
        (
            "Newly broken",
            f"Right by zero-shot, wrong by {name}; where {name} is most confident.",
            before & ~after,
            sure,
        ),
    ]


def _worst(is_it: _Truths, badness: Floats) -> list[int]:
    rows = np.flatnonzero(is_it)
    return [int(row) for row in rows[np.argsort(-badness[rows], kind="stable")[:_MOST]]]


def _card(data: ReportData, found: Joint, names: Sequence[str], row: int) -> Card:
    models = {"zero-shot": found.zero_shot, data.main.name: found.main}
    true = int(found.labels[row])
    picture, size = thumbnail(data.files[row])
    return Card(
        names[row],
        data.class_names[true],
        {
            name: _bars(own[row], true, data.class_names)
            for name, own in models.items()
            if own is not None
        },
        picture,
        size,
    )


def _bars(probabilities: Floats, true: int, class_names: Sequence[str]) -> Bars:
    first = np.argsort(-probabilities, kind="stable")[:_BARS].tolist()
    shown = first if true in first else [*first, true]
    return [(class_names[index], float(probabilities[index])) for index in shown]


def short_names(files: Sequence[Path]) -> list[str]:
    """Return the files as seen from the folder that all are in: what is above is nobody's business.

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
    small, buffer = max(rgb.size) <= SMALL, BytesIO()
    if small:
        rgb.save(buffer, "PNG", optimize=True)
    else:
        rgb.thumbnail((_LARGE, _LARGE))
        rgb.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}", rgb.size
