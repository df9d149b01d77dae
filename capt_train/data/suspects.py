"""The photos to look at again: labels that are probably wrong, and copies of one photo.

Every photo is judged by a model that was tuned without it. The less probable its label then is, the
more suspect it is, as in confident learning (arXiv 1911.00068). Read without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import is_inside, read_json, write_json
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.data.copies import Copy

SUSPECTS = "suspects.json"
_SCHEMA = 1


@dataclass(frozen=True)
class SuspectLabel:
    """A photo and what a model that has not seen it thinks of its label."""

    path: str
    split: str  # `train` or `val`
    label: str
    p_label: float  # calibrated probability of the label
    likely: str  # the most probable class
    p_likely: float
    p_wrong: float  # probability that the label is wrong, from the share of wrong labels in all


@dataclass(frozen=True)
class Suspects:
    """The content of `suspects.json`."""

    labels: tuple[SuspectLabel, ...]  # the most suspect first
    wrong_share: float  # estimated share of wrong labels
    copies: tuple[Copy, ...]  # those with two labels first, then those in two splits

    @property
    def probably_wrong(self) -> tuple[SuspectLabel, ...]:
        """Return the labels that are more probably wrong than right."""
        return tuple(photo for photo in self.labels if photo.p_wrong > 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        copies = [{**asdict(copy), "problem": copy.problem} for copy in self.copies]
        flagged = len(self.probably_wrong)
        return {"schema": _SCHEMA, "probably_wrong": flagged, **asdict(self), "copies": copies}

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "Suspects":
        """Read a saved file.

        Raises:
            RunError: it is missing, damaged or of another form.
        """
        content = read_json(path, RunError)
        try:
            if content["schema"] != _SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, expected {_SCHEMA}")
            labels = tuple(map(_label, content["labels"]))
            return cls(labels, _share(content["wrong_share"]), tuple(map(_copy, content["copies"])))
        except (KeyError, TypeError, ValueError) as cause:
            raise RunError(f"{path}: not as capt-train writes it ({cause!r})") from cause


def _label(row: Mapping[str, Any]) -> SuspectLabel:
    return SuspectLabel(
        _path(row["path"]),
        str(row["split"]),
        str(row["label"]),
        _share(row["p_label"]),
        str(row["likely"]),
        _share(row["p_likely"]),
        _share(row["p_wrong"]),
    )


def _copy(row: Mapping[str, Any]) -> Copy:
    (first_split, second_split), (first_label, second_label) = row["splits"], row["labels"]
    return Copy(
        _path(row["first"]),
        _path(row["second"]),
        (str(first_split), str(second_split)),
        (str(first_label), str(second_label)),
        _share(row["similarity"]),
    )


def _path(value: Any) -> str:
    if not isinstance(value, str) or not is_inside(value):
        raise ValueError(f"expected a path inside the folder of the photos, came {value!r}")
    return value


def _share(value: Any) -> float:
    if not 0 <= (share := float(value)) <= 1:
        raise ValueError(f"expected a share, came {value!r}")
    return share


def rank_labels(
    paths: Sequence[str],
    splits: Sequence[str],
    labels: Ints,
    probabilities: Floats,
    p_wrong: Floats,
    class_names: Sequence[str],
) -> tuple[SuspectLabel, ...]:
    """Return the photos, those with the least probable labels first.

    Args:
        paths: of the photos.
        splits: of the photos.
        labels: (photos,) columns.
        probabilities: (photos, classes), calibrated, by models that have not seen the photo.
        p_wrong: (photos,) probability that a label is wrong.
        class_names: of the columns.
    """
    p_labels = probabilities[np.arange(len(labels)), labels]
    best = probabilities.argmax(axis=1)
    return tuple(
        SuspectLabel(
            paths[row],
            splits[row],
            class_names[labels[row]],
            float(p_labels[row]),
            class_names[best[row]],
            float(probabilities[row, best[row]]),
            float(p_wrong[row]),
        )
        for row in np.argsort(p_labels, kind="stable").tolist()
    )
