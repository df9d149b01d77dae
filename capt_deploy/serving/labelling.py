"""Label many files; an unreadable file costs only its own row."""

import glob
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt_deploy.core.errors import DataError, ImageError
from capt_deploy.core.files import expand_home
from capt_deploy.core.text import escaped
from capt_deploy.data import folders
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.prediction import Prediction

CSV_HEADER = ("path", "label", "confidence", "error", "prediction_set", "rejected")
LOW_FAMILIARITY = 0.05  # of known images, one in twenty is below


@dataclass(frozen=True)
class LabelledFile:
    """One row of `capt-predict`: a file with its prediction or its error."""

    path: str
    result: Prediction | ImageError
    top_k: int
    show_set: bool = False  # in the text form

    @property
    def error(self) -> str | None:
        """Return why the file could not be read; None if it was."""
        return escaped(str(self.result)) if isinstance(self.result, ImageError) else None

    @property
    def shown_path(self) -> str:
        """Return the path, with an escape for each byte that is not UTF-8."""
        return escaped(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return the row's JSON form."""
        if isinstance(self.result, ImageError):
            return {"path": self.shown_path, "error": self.error}
        return {"path": self.shown_path, **self.result.to_dict(self.top_k)}

    def fields(self) -> tuple[str, ...]:
        """Return the row's CSV fields, in the order of CSV_HEADER."""
        prediction = self.result
        if isinstance(prediction, ImageError):
            return self.shown_path, "", "", self.error or "", "", ""
        names = "; ".join(prediction.prediction_set or ())
        rejected = "" if prediction.rejected is None else str(prediction.rejected).lower()
        confidence = f"{prediction.confidence:.6f}"
        return self.shown_path, prediction.label, confidence, "", names, rejected

    def __str__(self) -> str:
        prediction = self.result
        if isinstance(prediction, ImageError):
            return f"{self.shown_path}: error: {self.error}"
        line = ", ".join(f"{label} {share:.3f}" for label, share in prediction.top(self.top_k))
        familiarity = prediction.familiarity
        if familiarity is not None and familiarity < LOW_FAMILIARITY:
            line += f" (unfamiliar: {familiarity:.3f})"
        if prediction.rejected:
            line += " (rejected)"
        if self.show_set and prediction.prediction_set:
            line += f"; one of: {'; '.join(prediction.prediction_set)}"
        return f"{self.shown_path}: {line}"


def find_images(paths: Iterable[str], listed: Iterable[str] = ()) -> list[str]:
    """Expand folders (recursively) and patterns into files, in order, without repetition.

    Names in `listed`, which come from a file or a pipe, are taken as they are: a missing one gets
    an error row later and does not stop the others.

    Raises:
        DataError: a path does not exist, or nothing is left.
    """
    files: dict[str, None] = {}
    for name in paths:
        if not name:
            raise DataError("one of the paths is empty; is a shell variable unset?")
        path = expand_home(name)
        if path.is_dir():
            files |= dict.fromkeys(map(str, folders.images_below(path)))
        elif path.exists():
            files[str(path)] = None
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            files |= dict.fromkeys(match for match in matches if Path(match).is_file())
        else:
            raise DataError(f"{name}: no such file, folder, or pattern with a match")
    files |= dict.fromkeys(name for name in listed if name)
    if not files:
        raise DataError("found no image in what was given; expected images or folders of images")
    return list(files)


def read_names(lines: bytes) -> list[str]:
    """Return the file names in a list, one a line, in the encoding of file names.

    A byte-order mark, as PowerShell writes it, says that it is UTF-8 or UTF-16.
    """
    if lines.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        text = lines.decode("utf-16", "replace")
    else:
        text = os.fsdecode(lines.removeprefix(BOM_UTF8))
    return [name.removesuffix("\r") for name in text.split("\n")]


def label_files(
    classifier: Classifier,
    files: Sequence[str],
    top_k: int,
    batch_size: int,
    *,
    show_sets: bool = False,
) -> Generator[LabelledFile, None, None]:
    """Yield a row for every file, in order; while one batch runs, the next one is decoded."""
    results = classifier.stream(files, batch_size, errors="return")
    for name, result in zip(files, results, strict=True):
        yield LabelledFile(name, result, top_k, show_sets)
