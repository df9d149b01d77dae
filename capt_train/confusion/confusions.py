"""Who is mistaken for whom in a run, as a file that is read without torch (METHOD 2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import read_json, write_json
from capt_deploy.evaluation.evaluate import ClassPair

if TYPE_CHECKING:
    from capt_train.confusion.bank import ConfusionBank

CONFUSIONS = "confusions.json"
_SCHEMA = 1
_DECIMALS = 4  # of counts, which momentum makes fractions


@dataclass(frozen=True)
class ConfusedPair:
    """One cell of the confusion matrix that is not zero before tuning or after it."""

    true: str
    predicted: str
    before: float  # views of training images that were not tuned on, by the zero-shot model
    after: float  # the same views, after tuning
    samples: tuple[str, ...]  # paths of the images behind it, before or after


@dataclass(frozen=True)
class Confusions:
    """Everything that `confusions.json` says, worst pair first."""

    class_names: tuple[str, ...]  # of the tuned classes
    shots: tuple[int, ...]  # training images of each
    pairs: tuple[ConfusedPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"schema": _SCHEMA, **asdict(self)}

    def matrices(self) -> Float[NDArray[np.float64], "2 classes classes"]:
        """Return the counts before and after tuning, `[true, predicted]` of each."""
        counts = np.zeros((2, len(self.class_names), len(self.class_names)))
        position = {name: index for index, name in enumerate(self.class_names)}
        for pair in self.pairs:
            cell = position[pair.true], position[pair.predicted]
            counts[:, cell[0], cell[1]] = pair.before, pair.after
        return counts


def write_confusions(
    path: Path,
    class_names: Sequence[str],
    before: "ConfusionBank",
    after: "ConfusionBank",
    samples: Sequence[str],
) -> None:
    """Write what two banks of the same images hold, atomically.

    Args:
        path: usually `CONFUSIONS` in the run folder.
        class_names: of the tuned classes, one per position.
        before: the bank of the zero-shot model.
        after: the bank of the tuned model.
        samples: paths of the training images, one per row of the banks.
    """
    exact = np.stack([bank.counts.cpu().numpy() for bank in (before, after)])
    counts = exact.astype(np.float64).round(_DECIMALS)
    cells = np.argwhere(counts.any(axis=0))
    worst = np.argsort(-counts.max(axis=0)[tuple(cells.T)], kind="stable")
    behind = _paths_behind((before, after), samples)
    pairs = [
        ConfusedPair(
            class_names[true],
            class_names[predicted],
            float(counts[0, true, predicted]),
            float(counts[1, true, predicted]),
            behind.get((true, predicted), ()),
        )
        for true, predicted in cells[worst].tolist()
    ]
    shots = before.labels.bincount(minlength=len(class_names)).tolist()
    write_json(path, Confusions(tuple(class_names), tuple(shots), tuple(pairs)).to_dict())


def read_confusions(path: Path) -> Confusions:
    """Read what `write_confusions` wrote.

    Raises:
        RunError: the file is missing, damaged, or says what cannot be.
    """
    content = read_json(path, RunError)
    try:
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {_SCHEMA}")
        names = _texts(content["class_names"])
        shots = tuple(_shots(value) for value in content["shots"])
        pairs = tuple(_pair(row, frozenset(names)) for row in content["pairs"])
        if not len(names) == len(set(names)) == len(shots):
            raise ValueError("expected distinct class names with as many shots")
        if len({(pair.true, pair.predicted) for pair in pairs}) != len(pairs):
            raise ValueError("a pair is there twice")
    except (KeyError, TypeError, ValueError, OverflowError) as cause:
        raise RunError(f"{path}: not as capt-train writes it ({cause!r})") from cause
    return Confusions(names, shots, pairs)


def _paths_behind(
    banks: Sequence["ConfusionBank"], samples: Sequence[str]
) -> Mapping[ClassPair, tuple[str, ...]]:
    behind: dict[ClassPair, dict[str, None]] = {}  # in the order of the images, each once
    columns = [banks[0].labels.tolist(), *(bank.predicted.tolist() for bank in banks)]
    for path, true, *taken in zip(samples, *columns, strict=True):
        for predicted in taken:
            behind.setdefault((true, predicted), {})[path] = None
    return {cell: tuple(paths) for cell, paths in behind.items()}


def _pair(row: Mapping[str, Any], names: frozenset[str]) -> ConfusedPair:
    true, predicted = row["true"], row["predicted"]
    if not {true, predicted} <= names or true == predicted:
        raise ValueError(f"no pair of its classes: {true!r}, {predicted!r}")
    counts = _count(row["before"]), _count(row["after"])
    return ConfusedPair(true, predicted, *counts, _texts(row["samples"]))


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("expected a list of texts")
    return tuple(values)


def _shots(value: Any) -> int:
    if type(value) is not int or value < 0:  # true is an int, too
        raise TypeError(f"expected a number of images, came {value!r}")
    return value


def _count(value: Any) -> float:
    if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
        raise TypeError(f"expected a count, came {value!r}")
    return float(value)
