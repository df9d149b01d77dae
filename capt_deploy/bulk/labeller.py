"""Label the photos of a part and write their rows; what runs in each actor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.bulk import storage
from capt_deploy.bulk.parts import Part
from capt_deploy.bulk.results import Results
from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.core.errors import ImageError
from capt_deploy.data.batches import in_batches
from capt_deploy.data.images import ImageInput
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.labelling import LabelledFile

_READERS = 16  # of photos in a store, each of which waits most of the time
_Pixels = NDArray[np.uint8]
_Photo = tuple[str, ImageInput | None]  # name and content; None for a file of that name


@dataclass(frozen=True)
class LabelOptions:
    """What is asked of each photo, as `capt-predict` takes it."""

    backend: str = "auto"
    top_k: int = 5
    decisions: DecisionOptions | None = None
    fast_decode: bool = False
    batch_size: int = 32
    precision: str | None = None  # of the bundle's graphs; None for what suits the backend


@dataclass(frozen=True)
class Labeller:
    """Labels parts of photos with one classifier, which is loaded for the first of them."""

    bundle: Path
    options: LabelOptions
    results: Results
    threads: int  # of the backend on the CPU, and of decoding
    content: Mapping[str, bytes] | None = None  # of the bundle, where its path is not in reach

    @cached_property
    def classifier(self) -> Classifier:
        """Return the loaded classifier.

        Raises:
            BundleError, BackendError, ConfigError: as `Classifier.load`.
        """
        if self.content is None:
            return self._load(self.bundle)
        with TemporaryDirectory(prefix="capt-") as folder:
            for name, data in self.content.items():
                file = Path(folder, self.bundle.name, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            return self._load(Path(folder, self.bundle.name))

    def _load(self, bundle: Path) -> Classifier:
        options = self.options
        return Classifier.load(
            bundle,
            options.backend,
            options.precision,
            options=RuntimeOptions(threads=self.threads),
            fast_decode=options.fast_decode,
            decisions=options.decisions,
        )

    def label(self, part: Part) -> None:
        """Write the rows of a part.

        Raises:
            BundleError, BackendError, ConfigError: as `Classifier.load`.
            DataError: the part's table cannot be read.
            OSError: the rows cannot be written.
        """
        _ = self.classifier  # here, because each thread that decodes might load its own
        rows = [
            LabelledFile(name, result, self.options.top_k).to_dict()
            for name, result in self._results(part)
        ]
        self.results.write(part.number, rows)

    def _results(self, part: Part) -> Iterator[tuple[str, Any]]:
        remote = any(storage.local_path(name) is None for name in part.names)
        threads = max(self.threads, _READERS) if remote else self.threads
        photos = _photos(part, self.options.batch_size)
        for batch in in_batches(photos, self._decode, self.options.batch_size, threads):
            pixels = [result for _, result in batch if not isinstance(result, ImageError)]
            predictions = iter(self.classifier.run(np.stack(pixels)) if pixels else [])
            for name, result in batch:
                yield name, result if isinstance(result, ImageError) else next(predictions)

    def _decode(self, photo: _Photo) -> tuple[str, _Pixels | ImageError]:
        name, content = photo
        try:
            if content is None:
                content = storage.local_path(name) or storage.read_photo(name)
            return name, self.classifier.preprocess(content)
        except ImageError as error:
            return name, error


def _photos(part: Part, batch: int) -> Iterator[_Photo]:
    yield from ((name, None) for name in part.names)
    if part.table is None:
        return
    rows = storage.read_photos(part.table, part.start, part.stop, batch)
    for row, (name, content) in enumerate(rows, part.start):
        # An empty photo is no image, which becomes its row's error.
        yield name or f"{part.table}, row {row}", content or b""
