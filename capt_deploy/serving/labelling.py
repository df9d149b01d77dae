"""Label many files, and let one broken file spoil only its own row."""

import glob
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, visible_files
from capt_deploy.data.batches import preprocess_files
from capt_deploy.data.images import IMAGE_SUFFIXES
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.prediction import Prediction

CSV_HEADER = ("path", "label", "confidence", "error", "prediction_set", "rejected")


@dataclass(frozen=True)
class LabelledFile:
    """One row of `capt-predict`: a prediction or an error."""

    path: str
    prediction: Prediction | None
    top_k: int
    error: str | None = None
    show_set: bool = False  # in the line of text

    def to_dict(self) -> dict[str, Any]:
        """Return the row's JSON form."""
        if self.prediction is None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, **self.prediction.to_dict(self.top_k)}

    def fields(self) -> tuple[str, ...]:
        """Return the row's CSV fields, those of CSV_HEADER."""
        own = self.prediction
        if own is None:
            return self.path, "", "", self.error or "", "", ""
        inside = "" if own.prediction_set is None else "; ".join(own.prediction_set)
        rejected = "" if own.rejected is None else str(own.rejected).lower()
        return self.path, own.label, f"{own.confidence:.6f}", "", inside, rejected

    def __str__(self) -> str:
        if self.prediction is None:
            return f"{self.path}: error: {self.error}"
        top = self.prediction.top(self.top_k)
        shown = ", ".join(f"{label} {share:.3f}" for label, share in top)
        rejected = " (rejected)" if self.prediction.rejected else ""
        likely = self.prediction.prediction_set
        listed = f"; one of: {'; '.join(likely)}" if self.show_set and likely else ""
        return f"{self.path}: {shown}{rejected}{listed}"


def find_images(paths: Iterable[str], listed: Iterable[str] = ()) -> list[str]:
    """Expand folders (recursively) and patterns into files, in order, without repetition.

    Names that are `listed` in a file or pipe are taken as they are: one that is not there gets
    its error row later and does not stop the others.

    Raises:
        DataError: a path does not exist, or nothing is left.
    """
    found: dict[str, None] = {}
    for name in paths:
        if not name:
            raise DataError("one of the paths is empty; is a shell variable unset?")
        path = expand_home(name)
        if path.is_dir():
            files = [f for f in visible_files(path) if f.suffix.lower() in IMAGE_SUFFIXES]
            found |= dict.fromkeys(str(file) for file in files)
        elif path.exists():
            found[str(path)] = None
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            found |= dict.fromkeys(match for match in matches if Path(match).is_file())
        else:
            raise DataError(f"{name}: no such file, folder, or pattern with a match")
    found |= dict.fromkeys(name for name in listed if name)
    if not found:
        raise DataError("found no image in what was given; expected images or folders of images")
    return list(found)


def label_files(
    classifier: Classifier,
    files: Sequence[str],
    top_k: int,
    batch_size: int,
    *,
    show_sets: bool = False,
) -> Generator[LabelledFile, None, None]:
    """Yield a row for every file, in order; while one batch runs, the next one is decoded."""
    config, fast = classifier.manifest.preprocess, classifier.fast_decode
    for batch in preprocess_files(files, config, batch_size, fast_decode=fast):
        predictions = iter([] if batch.pixels is None else classifier.run(batch.pixels))
        for name in batch.files:
            prediction = None if name in batch.errors else next(predictions)
            yield LabelledFile(name, prediction, top_k, batch.errors.get(name), show_sets)
