"""Which classes a run confuses, as a file that is read without torch (METHOD 2)."""

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
from capt_deploy.evaluation.evaluate import ClassPair, classes_of_worst

if TYPE_CHECKING:
    from capt_train.confusion.bank import ConfusionBank

CONFUSIONS = "confusions.json"
_SCHEMA = 1
_DECIMALS = 4  # of counts, which momentum makes fractions


@dataclass(frozen=True)
class ConfusionCell:
    """One cell of the confusion matrix that is not zero before tuning or after it."""

    true: str
    predicted: str
    before: float  # held-out images, by the zero-shot model
    after: float  # the same images, by models that were not tuned on them
    samples: tuple[str, ...]  # paths of the images behind it, before or after

    def worst(self) -> float:
        """Return the higher of both counts."""
        return max(self.before, self.after)


@dataclass(frozen=True)
class Confusions:
    """The content of `confusions.json`, worst pair first."""

    class_names: tuple[str, ...]  # of the tuned classes
    shots: tuple[int, ...]  # images of each that were counted
    pairs: tuple[ConfusionCell, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"schema": _SCHEMA, **asdict(self)}

    def among_worst(self, most: int) -> "Confusions":
        """Return the confusions among at most so many classes, those of the worst pairs."""
        if len(self.class_names) <= most:
            return self
        kept = classes_of_worst(((pair.true, pair.predicted) for pair in self.pairs), most)
        shown = [place for place, name in enumerate(self.class_names) if name in kept]
        return Confusions(
            tuple(self.class_names[place] for place in shown),
            tuple(self.shots[place] for place in shown),
            tuple(pair for pair in self.pairs if {pair.true, pair.predicted} <= kept),
        )

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
) -> Confusions:
    """Write the confusions in two banks of the same images, atomically, and return them.

    Args:
        path: usually `CONFUSIONS` in the run folder.
        class_names: of the tuned classes, one per position.
        before: the bank of the zero-shot model.
        after: the bank of the tuned model.
        samples: paths of the training images, one per row of the banks.
    """
    first, second = (
        {cell: round(count, _DECIMALS) for cell, count in bank.confusions().items()}
        for bank in (before, after)
    )
    paths = _paths_behind((before, after), samples)
    pairs = [
        ConfusionCell(
            class_names[cell[0]],
            class_names[cell[1]],
            first.get(cell, 0.0),
            second.get(cell, 0.0),
            paths.get(cell, ()),
        )
        for cell in sorted({*first, *second})
    ]
    pairs = sorted(filter(ConfusionCell.worst, pairs), key=ConfusionCell.worst, reverse=True)
    shots = before.labels.bincount(minlength=len(class_names)).tolist()
    confusions = Confusions(tuple(class_names), tuple(shots), tuple(pairs))
    write_json(path, confusions.to_dict())
    return confusions


def read_confusions(path: Path) -> Confusions:
    """Read a file that `write_confusions` wrote.

    Raises:
        RunError: the file is missing, damaged or of another form.
    """
    content = read_json(path, RunError)
    try:
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {_SCHEMA}")
        names, shots = content["class_names"], content["shots"]
        if not isinstance(names, list) or not len(set(names)) == len(shots) == len(names):
            raise ValueError("expected distinct class names with as many shots")
        pairs = tuple(_cell(row, frozenset(names)) for row in content["pairs"])
    except (KeyError, TypeError, ValueError, OverflowError) as cause:
        raise RunError(f"{path}: not as capt-train writes it ({cause!r})") from cause
    return Confusions(tuple(names), tuple(shots), pairs)


def _cell(row: Mapping[str, Any], names: frozenset[str]) -> ConfusionCell:
    true, predicted = row["true"], row["predicted"]
    counts = float(row["before"]), float(row["after"])
    if true == predicted or not {true, predicted} <= names:
        raise ValueError(f"expected two of the classes, came {true!r}, {predicted!r}")
    if not all(0 <= count < math.inf for count in counts) or isinstance(row["samples"], str):
        raise ValueError(f"expected counts and a list of paths, came {row}")
    return ConfusionCell(true, predicted, *counts, tuple(row["samples"]))


def _paths_behind(
    banks: Sequence["ConfusionBank"], samples: Sequence[str]
) -> Mapping[ClassPair, tuple[str, ...]]:
    """Return the images behind each cell of either bank, each once, in their order."""
    paths: dict[ClassPair, dict[str, None]] = {}
    columns = [banks[0].labels.tolist(), *(bank.predicted.tolist() for bank in banks)]
    for path, true, *labels in zip(samples, *columns, strict=True):
        for predicted in labels:
            paths.setdefault((true, predicted), {})[path] = None
    return {cell: tuple(images) for cell, images in paths.items()}
