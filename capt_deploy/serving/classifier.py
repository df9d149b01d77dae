"""The class that applications embed: images in, labels with calibrated confidences out."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Lock

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
from capt_deploy.bundle.graphs import open_graphs
from capt_deploy.bundle.manifest import Manifest
from capt_deploy.confidence.decisions import USUAL, DecisionOptions, wanted_decisions
from capt_deploy.confidence.monitor import Monitor
from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import Process
from capt_deploy.data.batches import in_batches
from capt_deploy.data.images import ImageInput
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.batcher import Batcher, BatcherOptions
from capt_deploy.serving.known_classes import KnownClasses
from capt_deploy.serving.prediction import Prediction

_BATCHER = BatcherOptions()


class Classifier:
    """A loaded bundle. Thread-safe; not to be used in a forked copy of its process."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        precision: str,
        known: KnownClasses | None = None,
        *,
        skipped: Mapping[str, str] | None = None,
        fast_decode: bool = False,
        batcher: BatcherOptions = _BATCHER,
        decisions: DecisionOptions = USUAL,
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self.precision = precision
        self.skipped = dict(skipped or {})  # by name, why faster backends are not used
        self.fast_decode = fast_decode
        self.preprocess = partial(preprocess, config=manifest.preprocess, fast_decode=fast_decode)
        self._process = Process()
        self._changing = Lock()
        self._closed = False
        self._batcher_options = batcher
        self._batcher: Batcher[Prediction] | None = None
        self._decisions = decisions
        self._known = known or KnownClasses(manifest, None)

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
        decisions: DecisionOptions = USUAL,
    ) -> "Classifier":
        """Load a bundle folder, a zip of one, or a lone `model.onnx`.

        Args:
            path: of it.
            backend: one of `capt_deploy.backends.NAMES`.
            precision: which of a bundle's graphs; by default the one that suits the backend.
            options: how to use the machine.
            fast_decode: read large JPEGs at a lower resolution, see `preprocess`.
            batcher: of `submit`.
            decisions: what is wanted of prediction sets and of predictions that are not rejected.

        Raises:
            BundleError: it is damaged, unknown, or does not hold that precision.
            BackendError: the requested backend cannot run here.
            ConfigError: the wanted accuracy cannot be promised.
        """
        names = candidates(backend)
        graphs = open_graphs(path)
        known = KnownClasses(graphs.manifest, graphs.bundle)
        # Before an engine is built; whoever hands options over asks for what they say
        known.check(decisions, asked=decisions is not USUAL)

        def begin(name: str) -> tuple[Backend, str]:
            graph = graphs.read(precision or preferred_precision(name, graphs.precisions))
            own = start(name, graph.onnx, graph.precision, graph.weights_folder, options)
            return own, graph.precision

        (engine, chosen), skipped = first_that_works(names, begin)
        return cls(
            graphs.manifest,
            engine,
            chosen,
            known,
            skipped=skipped,
            fast_decode=fast_decode,
            batcher=batcher,
            decisions=decisions,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of all probabilities; added ones behind the bundle's."""
        return self._known.names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Whether the prompt was tuned on each class."""
        return self._known.tuned

    def add_classes(self, names: Iterable[str]) -> None:
        """Let all later predictions know further classes, by name alone; all of them or none.

        They get the rows that an export with `--classes` gives them. Predictions that are under way
        in other threads end with the classes that they began with.

        Raises:
            ConfigError: a name is empty, too long for the text tower, or there already.
            BundleError: the bundle was not exported with `--open-vocab`, was changed, or a package
                is missing; or sets or rejection were asked for when it was loaded.
        """
        self._check()
        self._known.add(names, self.precision, self._decisions)

    def monitor(self) -> Monitor:
        """Return what watches all predictions from the first call of this method on.

        It compares them with those of the run's validation images, where the bundle has these.
        """
        return self._known.monitor(self._decisions)

    def __call__(
        self, image: ImageInput, *, coverage: float | None = None, accuracy: float | None = None
    ) -> Prediction:
        """Classify one image; see `run`. Raises `ImageError` if it cannot be decoded."""
        pixels = self.preprocess(image)[np.newaxis]
        return self.run(pixels, coverage=coverage, accuracy=accuracy)[0]

    def predict(
        self,
        images: Iterable[ImageInput],
        batch_size: int = 32,
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
    ) -> list[Prediction]:
        """Classify images; while one batch runs, the next one is decoded, and no more of them.

        Raises:
            ImageError: at the first image that cannot be decoded.
            BundleError, ConfigError: as `run`.
        """
        self._check()
        wanted = self._wanted(coverage, accuracy)
        predictions: list[Prediction] = []
        for batch in in_batches(images, self.preprocess, batch_size):
            predictions += self._answer(np.stack(batch), wanted)
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

    def run(
        self,
        pixels: NDArray[np.uint8],
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
    ) -> list[Prediction]:
        """Classify preprocessed pixels, (batch, height, width, 3) RGB 0-255.

        Args:
            pixels: of the images.
            coverage: wanted of their prediction sets; by default as the classifier was loaded.
            accuracy: wanted of those that are not rejected; likewise.

        Raises:
            BundleError: sets or rejection are asked for, and the bundle has no scores for them.
            ConfigError: the wanted accuracy cannot be promised.
        """
        self._check()
        return self._answer(pixels, self._wanted(coverage, accuracy))

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

    def _wanted(self, coverage: float | None, accuracy: float | None) -> DecisionOptions:
        if coverage is None and accuracy is None:
            return self._decisions
        wanted = wanted_decisions(coverage, accuracy, self._decisions)
        self._known.check(wanted, asked=True)
        return wanted

    def _answer(
        self, pixels: NDArray[np.uint8], wanted: DecisionOptions | None = None
    ) -> list[Prediction]:
        outputs = self.backend.run(pixels)
        return self._known.predictions(outputs, self.precision, wanted or self._decisions)


def running_on(classifier: Classifier) -> str:
    """Return in words what runs a classifier, and whether that is second choice."""
    backend, skipped = classifier.backend, ", ".join(classifier.skipped)
    why = f" (capt-doctor says why not {skipped})" if skipped else ""
    return f"{backend.name} on {backend.device}, {classifier.precision}{why}"
