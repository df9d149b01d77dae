"""The class that applications embed: images in, labels with calibrated confidences out."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Backend, create, preferred_precision
from capt_deploy.bundle import Bundle, open_bundle
from capt_deploy.errors import BundleError
from capt_deploy.files import expand_home
from capt_deploy.images import ImageInput
from capt_deploy.manifest import PRECISION_KEY, Manifest
from capt_deploy.onnx_metadata import read_metadata
from capt_deploy.preprocess import preprocess

if TYPE_CHECKING:
    from capt_deploy.open_vocabulary import Head, TextSide


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
    """A loaded bundle. Thread-safe."""

    def __init__(
        self, manifest: Manifest, backend: Backend, precision: str, bundle: Bundle | None = None
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self.precision = precision
        self._bundle = bundle
        self._adding = Lock()
        self._texts: TextSide | None = None
        self._head: Head | None = None  # once there are more classes than the graph's

    @classmethod
    def load(
        cls, path: str | Path, backend: str = "auto", precision: str | None = None
    ) -> "Classifier":
        """Load a bundle folder, a zip of one, or a lone `model.onnx`.

        Args:
            path: of it.
            backend: one of `capt_deploy.backends.NAMES`.
            precision: which of a bundle's graphs; by default the one that suits the backend.

        Raises:
            BundleError: it is damaged, unknown, or does not hold that precision.
            BackendError: the requested backend cannot run here.
        """
        path = expand_home(path)
        if path.suffix == ".onnx":
            return cls._load_onnx(path, backend)
        bundle = open_bundle(path)
        chosen = precision or preferred_precision(backend, bundle.manifest.graphs)
        precision, onnx = bundle.graph(chosen)
        # Only the graph is hashed: a manifest with other names would mislabel every image.
        inside = Manifest.from_json(read_metadata(onnx) or "", f"{path}, inside the graph")
        if replace(bundle.manifest, files={}) != inside:
            raise BundleError(f"{path}: its manifest was changed after the export; export it again")
        if not bundle.manifest.verified:
            warnings.warn(f"{path}: was exported although its check had failed", stacklevel=2)
        engine = create(backend, onnx, precision, bundle.weights_folder(precision))
        return cls(bundle.manifest, engine, precision, bundle)

    @classmethod
    def _load_onnx(cls, path: Path, backend: str) -> "Classifier":
        try:
            onnx = path.read_bytes()
        except OSError as cause:
            raise BundleError(f"{path}: cannot be read ({cause})") from cause
        text = read_metadata(onnx)
        if text is None:
            raise BundleError(f"{path}: carries no manifest; expected a graph from capt-export")
        manifest = Manifest.from_json(text, str(path))
        precision = read_metadata(onnx, PRECISION_KEY) or next(iter(manifest.graphs))
        if precision not in manifest.graphs:
            raise BundleError(f"{path}: its manifest knows no {precision} graph; export it again")
        if manifest.graphs[precision].weights:
            raise BundleError(f"{path}: its weights are in a second file; load the whole bundle")
        return cls(manifest, create(backend, onnx, precision), precision)

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

        if self._bundle is None:
            raise BundleError("a lone graph has no text side; load the whole bundle to add classes")
        with self._adding:
            texts = self._texts = self._texts or TextSide.of(self._bundle)
            head = self._head or Head.of(self._bundle, self.precision)
            temperature = self.manifest.calibration[self.precision]["temperature"]
            self._head = head.with_classes(texts, names, temperature)

    def __call__(self, image: ImageInput) -> Prediction:
        """Classify one image. Raises `ImageError` if it cannot be decoded."""
        return self.predict([image])[0]

    def predict(self, images: Iterable[ImageInput], batch_size: int = 32) -> list[Prediction]:
        """Classify images, with one batch of pixels in memory at a time.

        Raises:
            ImageError: at the first image that cannot be decoded.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, came {batch_size}")
        predictions: list[Prediction] = []
        rest = iter(images)
        while batch := list(islice(rest, batch_size)):
            predictions += self.run(
                np.stack([preprocess(i, self.manifest.preprocess) for i in batch])
            )
        return predictions

    def run(self, pixels: NDArray[np.uint8]) -> list[Prediction]:
        """Classify preprocessed pixels, (batch, height, width, 3) RGB 0-255."""
        outputs, head = self.backend.run(pixels), self._head
        if head is None:
            names, probabilities = self.manifest.class_names, outputs.probabilities
        else:
            names, probabilities = head.class_names, head.probabilities(outputs.embedding)
        return [_prediction(row, names) for row in probabilities]


def _prediction(probabilities: NDArray[np.float32], class_names: tuple[str, ...]) -> Prediction:
    best = int(probabilities.argmax())
    return Prediction(class_names[best], float(probabilities[best]), probabilities, class_names)
