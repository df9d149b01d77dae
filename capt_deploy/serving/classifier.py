"""The class that applications embed: images in, labels with calibrated confidences out."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.backends.base import Backend
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.backends.spec import find_backends
from capt_deploy.bundle.read import open_bundle
from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.confidence.monitor import Monitor
from capt_deploy.core.errors import BackendError, ConfigError, ImageError
from capt_deploy.core.process import Process
from capt_deploy.data.batches import in_batches
from capt_deploy.data.images import ImageInput
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.batcher import Batcher, BatcherOptions
from capt_deploy.serving.opening import open_backend
from capt_deploy.serving.prediction import Prediction
from capt_deploy.serving.predictor import Predictor

Errors = Literal["raise", "return"]
_BATCHER = BatcherOptions()


class Classifier:
    """A loaded bundle. Thread-safe; not to be used in a forked copy of its process."""

    def __init__(
        self,
        predictor: Predictor,
        backend: Backend,
        precision: str,
        *,
        skipped: Mapping[str, str] | None = None,
        fast_decode: bool = False,
        batcher: BatcherOptions = _BATCHER,
    ) -> None:
        self.manifest = manifest = predictor.bundle.manifest
        self.backend = backend
        self.precision = precision
        self.skipped = dict(skipped or {})  # by name of a backend for GPUs, why it is not used
        self.preprocess = partial(preprocess, config=manifest.preprocess, fast_decode=fast_decode)
        self._predictor = predictor
        self._process = Process()
        self._changing = Lock()
        self._closed = False
        self._batcher_options = batcher
        self._batcher: Batcher | None = None

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
        decisions: DecisionOptions | None = None,
    ) -> "Classifier":
        """Load a bundle folder, a zip of one, or a lone `model.onnx`.

        Args:
            path: of the bundle.
            backend: one of `capt_deploy.backends.spec.backend_names()`.
            precision: of the bundle's graphs; by default the one that suits the backend, or with
                "auto" on a CPU the fastest, which a trial measures.
            options: how to use the machine.
            fast_decode: read large JPEGs at a lower resolution, see `preprocess`.
            batcher: batches of `submit`.
            decisions: prediction sets and rejection. Without them predictions carry sets of
                coverage 0.9 where the bundle can make some; with them a bundle that cannot is
                refused, and so is `add_classes`.

        Raises:
            BundleError: it is damaged, unknown, does not hold that precision, or has no scores of
                validation images although `decisions` are given.
            BackendError: the requested backend cannot run here.
            ConfigError: `decisions` cannot be promised.
        """
        find_backends(backend)  # a wrong name is an error before a large file is read
        bundle = open_bundle(path)
        if not bundle.manifest.verified:
            warnings.warn(f"{path}: was exported although its check had failed", stacklevel=2)
        predictor = Predictor(bundle, decisions)
        opened = open_backend(bundle, backend, precision, options)
        return cls(
            predictor,
            opened.backend,
            opened.candidate.precision,
            skipped=opened.skipped,
            fast_decode=fast_decode,
            batcher=batcher,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of all probabilities, added ones last."""
        return self._predictor.class_names

    @property
    def tuned(self) -> tuple[bool, ...]:
        """Return whether each class was tuned on."""
        return self._predictor.tuned

    @property
    def running_on(self) -> str:
        """Return backend, device and precision in words, and faster backends that do not work."""
        skipped = ", ".join(self.skipped)
        why = f" (capt-doctor says why not {skipped})" if skipped else ""
        return f"{self.backend.name} on {self.backend.device}, {self.precision}{why}"

    def add_classes(self, names: Iterable[str]) -> None:
        """Add classes by name alone to all later predictions; all of them or none.

        They get the rows that an export with `--classes` gives them. Predictions under way in other
        threads end with the classes that they began with. Validation images say nothing about
        added classes, so that later predictions have no set, rejection or familiarity; a warning
        says so once. A classifier that was loaded with `decisions`, which ask for these, refuses.

        Raises:
            ConfigError: a name is empty, too long for the text tower, or exists already.
            BundleError: the bundle was not exported with `--open-vocab`, was changed, or a package
                is missing; or the classifier was loaded with `decisions`.
        """
        self._check()
        self._predictor.add_classes(names, self.precision)

    def monitor(self) -> Monitor:
        """Return the monitor of all predictions from the first call of this method on.

        It compares them with those of the run's validation images, where the bundle has these.
        """
        return self._predictor.monitor()

    def __call__(
        self, image: ImageInput, *, coverage: float | None = None, accuracy: float | None = None
    ) -> Prediction:
        """Classify one image; see `run`.

        Raises:
            ImageError: the image cannot be decoded.
            BundleError, ConfigError: as `run`.
        """
        pixels = self.preprocess(image)[np.newaxis]
        return self.run(pixels, coverage=coverage, accuracy=accuracy)[0]

    @overload
    def predict(
        self,
        images: Iterable[ImageInput] | ImageInput,
        batch_size: int = 32,
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        images: Iterable[ImageInput] | ImageInput,
        batch_size: int = 32,
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
        errors: Literal["return"],
    ) -> list[Prediction | ImageError]: ...

    def predict(
        self,
        images: Iterable[ImageInput] | ImageInput,
        batch_size: int = 32,
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
        errors: Errors = "raise",
    ) -> list[Prediction] | list[Prediction | ImageError]:
        """Classify images; while one batch runs, the next one is decoded.

        Args:
            images: any number of images. A single one (a path, bytes, a Pillow image, one array)
                gives a list of one prediction.
            batch_size: images run at once.
            coverage: of prediction sets; see `run`.
            accuracy: of predictions that are not rejected; see `run`.
            errors: "return" puts the `ImageError` of an image that cannot be decoded in its place.

        Raises:
            ImageError: an image cannot be decoded, unless errors are returned.
            BundleError, ConfigError: as `run`.
        """
        options = {"coverage": coverage, "accuracy": accuracy}
        return [*self.stream(images, batch_size, errors=errors, **options)]

    def stream(
        self,
        images: Iterable[ImageInput] | ImageInput,
        batch_size: int = 32,
        *,
        coverage: float | None = None,
        accuracy: float | None = None,
        errors: Errors = "raise",
    ) -> Iterator[Prediction | ImageError]:
        """Yield the results of `predict` batch by batch, with at most two batches in memory."""
        self._check()
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors: expected 'raise' or 'return', came {errors!r}")
        options = self._predictor.options(coverage, accuracy)
        if isinstance(images, str | Path | bytes | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        ):
            images = [images]
        decode = self.preprocess if errors == "raise" else self._try_preprocess
        for batch in in_batches(images, decode, batch_size):
            pixels = [item for item in batch if not isinstance(item, ImageError)]
            predictions = iter(self._predict(np.stack(pixels), options) if pixels else [])
            for item in batch:
                yield item if isinstance(item, ImageError) else next(predictions)

    def _try_preprocess(self, image: ImageInput) -> NDArray[np.uint8] | ImageError:
        try:
            return self.preprocess(image)
        except ImageError as error:
            return error

    def submit(
        self, image: ImageInput, *, coverage: float | None = None, accuracy: float | None = None
    ) -> "Future[Prediction]":
        """Return at once with the future of a prediction; a thread runs such requests in batches.

        Paths and bytes are decoded in the background; arrays and Pillow images, which the caller
        could change meanwhile, before this returns. Callbacks of the future run in the thread that
        runs the batches: keep them short.

        Raises:
            BusyError: more requests wait than `BatcherOptions.max_waiting`.
            BackendError: the classifier is closed, or the batcher's thread has died.
            BundleError, ConfigError: as `run`.
        """
        self._check()
        options = self._predictor.options(coverage, accuracy)
        batcher = self._batcher
        if batcher is None:
            with self._changing:
                self._check()
                batcher = self._batcher = self._batcher or Batcher(
                    self.preprocess, self._predict_each, self._batcher_options
                )
        return batcher.submit(image, options)

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
            coverage: share of the images whose prediction set holds the true class, 0-1; by
                default as the classifier was loaded.
            accuracy: share of right ones among the predictions that are not rejected; likewise.

        Raises:
            BundleError: one of the two is given, and there are no scores of validation images.
            ConfigError: the accuracy cannot be promised.
        """
        self._check()
        return self._predict(pixels, self._predictor.options(coverage, accuracy))

    def _predict(self, pixels: NDArray[np.uint8], options: DecisionOptions) -> list[Prediction]:
        outputs = self.backend.run(pixels)
        return self._predictor.predictions(outputs, self.precision, options)

    def _predict_each(
        self, pixels: NDArray[np.uint8], options: list[DecisionOptions]
    ) -> list[Prediction]:
        outputs = self.backend.run(pixels)
        return self._predictor.predictions_each(outputs, self.precision, options)

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

    def _check(self) -> None:
        self._process.check()
        if self._closed:
            raise BackendError("the classifier is closed; load it again")

    def __repr__(self) -> str:
        return f"Classifier({len(self.class_names)} classes, {self.running_on})"

    def __enter__(self) -> "Classifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
