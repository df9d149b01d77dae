"""The class that applications embed: images in, labels with calibrated confidences out."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import (
    DEFAULT_OPTIONS,
    Backend,
    RuntimeOptions,
    candidates,
    preferred_precision,
    start,
)
from capt_deploy.backends.choice import first_that_works
from capt_deploy.batcher import Batcher, BatcherOptions
from capt_deploy.batches import in_batches
from capt_deploy.bundle import Bundle
from capt_deploy.errors import BackendError, BundleError
from capt_deploy.graphs import open_graphs
from capt_deploy.images import ImageInput
from capt_deploy.manifest import Manifest
from capt_deploy.preprocess import preprocess
from capt_deploy.process import Process

if TYPE_CHECKING:
    from capt_deploy.open_vocabulary import Head, TextSide

_BATCHER = BatcherOptions()


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Prediction:
    """What the classifier says about one image."""

    label: str
    confidence: float  # calibrated probability of `label`, 0-1
    probabilities: NDArray[np.float32]  # (classes,), in the order of `class_names`
    class_names: tuple[str, ...]

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the `k` most probable classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.class_names[index], float(self.probabilities[index])) for index in order]

    def __repr__(self) -> str:
        return f"Prediction(label={self.label!r}, confidence={self.confidence:.3f})"


class Classifier:
    """A loaded bundle. Thread-safe; not to be used in a forked copy of its process."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        precision: str,
        bundle: Bundle | None = None,
        *,
        skipped: Mapping[str, str] | None = None,
        fast_decode: bool = False,
        batcher: BatcherOptions = _BATCHER,
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self.precision = precision
        self.skipped = dict(skipped or {})  # by name, why faster backends are not used
        self.fast_decode = fast_decode
        self.preprocess = partial(preprocess, config=manifest.preprocess, fast_decode=fast_decode)
        self._bundle = bundle
        self._process = Process()
        self._changing = Lock()
        self._closed = False
        self._batcher_options = batcher
        self._batcher: Batcher[Prediction] | None = None
        self._texts: TextSide | None = None
        self._head: Head | None = None  # once there are more classes than the graph's

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        precision: str | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
        *,
        fast_decode: bool = False,
        batcher: BatcherOptions = _BATCHER,
    ) -> "Classifier":
        """Load a bundle folder, a zip of one, or a lone `model.onnx`.

        Args:
            path: of it.
            backend: one of `capt_deploy.backends.NAMES`.
            precision: which of a bundle's graphs; by default the one that suits the backend.
            options: how to use the machine.
            fast_decode: read large JPEGs at a lower resolution, see `preprocess`.
            batcher: of `submit`.

        Raises:
            BundleError: it is damaged, unknown, or does not hold that precision.
            BackendError: the requested backend cannot run here.
        """
        names = candidates(backend)
        graphs = open_graphs(path)

        def begin(name: str) -> tuple[Backend, str]:
            graph = graphs.read(precision or preferred_precision(name, graphs.precisions))
            own = start(name, graph.onnx, graph.precision, graph.weights_folder, options)
            return own, graph.precision

        (engine, chosen), skipped = first_that_works(names, begin)
        return cls(
            graphs.manifest,
            engine,
            chosen,
            graphs.bundle,
            skipped=skipped,
            fast_decode=fast_decode,
            batcher=batcher,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of all probabilities; added ones behind the bundle's."""
        return self.manifest.class_names if self._head is None else self._head.class_names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Whether the prompt was tuned on each class."""
        return self.manifest.tuned if self._head is None else self._head.tuned

    def add_classes(self, names: Iterable[str]) -> None:
        """Let all later predictions know further classes, by name alone; all of them or none.

        They get the rows that an export with `--classes` gives them. Predictions that are under way
        in other threads end with the classes that they began with.

        Raises:
            ConfigError: a name is empty, too long for the text tower, or there already.
            BundleError: the bundle was not exported with `--open-vocab`, was changed, or a package
                is missing.
        """
        from capt_deploy.open_vocabulary import Head, TextSide

        self._check()
        if self._bundle is None:
            raise BundleError("a lone graph has no text side; load the whole bundle to add classes")
        with self._changing:
            texts = self._texts = self._texts or TextSide.of(self._bundle)
            head = self._head or Head.of(self._bundle, self.precision)
            temperature = self.manifest.calibration[self.precision]["temperature"]
            self._head = head.with_classes(texts, names, temperature)

    def __call__(self, image: ImageInput) -> Prediction:
        """Classify one image. Raises `ImageError` if it cannot be decoded."""
        return self.run(self.preprocess(image)[np.newaxis])[0]

    def predict(self, images: Iterable[ImageInput], batch_size: int = 32) -> list[Prediction]:
        """Classify images; while one batch runs, the next one is decoded, and no more of them.

        Raises:
            ImageError: at the first image that cannot be decoded.
        """
        self._check()
        predictions: list[Prediction] = []
        for batch in in_batches(images, self.preprocess, batch_size):
            predictions += self.run(np.stack(batch))
        return predictions

    def submit(self, image: ImageInput) -> "Future[Prediction]":
        """Return at once with the prediction to come; a thread runs such requests in batches.

        Paths and bytes are decoded in the background; arrays and Pillow images, which the caller
        could change meanwhile, before this returns. Callbacks of the future run in the thread that
        runs the batches: keep them short.

        Raises:
            BusyError: more requests wait than `BatcherOptions.max_waiting`.
            BackendError: it is closed, or the batcher's thread has died.
        """
        self._check()
        batcher = self._batcher
        if batcher is None:
            with self._changing:
                self._check()
                batcher = self._batcher = self._batcher or Batcher(
                    self.preprocess, self._answer, self._batcher_options
                )
        return batcher.submit(image)

    def run(self, pixels: NDArray[np.uint8]) -> list[Prediction]:
        """Classify preprocessed pixels, (batch, height, width, 3) RGB 0-255."""
        self._check()
        return self._answer(pixels)

    def close(self, *, drain: bool = True) -> None:
        """Answer what was submitted, or cancel it without `drain`; then free the backend.

        A second call does nothing. In a forked copy of the process nothing is freed.
        """
        if not self._process.is_this:
            return
        with self._changing:
            self._closed = True
        if self._batcher is not None:
            self._batcher.close(drain=drain, after=self.backend.close)
        else:
            self.backend.close()

    def __repr__(self) -> str:
        return f"Classifier({len(self.class_names)} classes, {running_on(self)})"

    def __enter__(self) -> "Classifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        self._process.check()
        if self._closed:
            raise BackendError("the classifier is closed; load it again")

    def _answer(self, pixels: NDArray[np.uint8]) -> list[Prediction]:
        outputs, head = self.backend.run(pixels), self._head
        if head is None:
            names, probabilities = self.manifest.class_names, outputs.probabilities
        else:
            names, probabilities = head.class_names, head.probabilities(outputs.embedding)
        return [_prediction(row, names) for row in probabilities]


def running_on(classifier: Classifier) -> str:
    """Return in words what runs a classifier, and whether that is second choice."""
    backend, skipped = classifier.backend, ", ".join(classifier.skipped)
    why = f" (capt-doctor says why not {skipped})" if skipped else ""
    return f"{backend.name} on {backend.device}, {classifier.precision}{why}"


def _prediction(probabilities: NDArray[np.float32], class_names: tuple[str, ...]) -> Prediction:
    best = int(probabilities.argmax())
    return Prediction(class_names[best], float(probabilities[best]), probabilities, class_names)
