"""The class that applications embed: images in, labels with calibrated confidences out."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Backend, create, preferred_precision
from capt_deploy.bundle import open_bundle
from capt_deploy.errors import BundleError
from capt_deploy.files import expand_home
from capt_deploy.images import ImageInput
from capt_deploy.manifest import PRECISION_KEY, Manifest
from capt_deploy.onnx_metadata import read_metadata
from capt_deploy.preprocess import preprocess


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

    def __init__(self, manifest: Manifest, backend: Backend, precision: str) -> None:
        self.manifest = manifest
        self.backend = backend
        self.precision = precision

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
        return cls(bundle.manifest, engine, precision)

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
        """Class names, in the order of all probabilities."""
        return self.manifest.class_names

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
        return [
            self._prediction(probabilities)
            for probabilities in self.backend.run(pixels).probabilities
        ]

    def _prediction(self, probabilities: NDArray[np.float32]) -> Prediction:
        best = int(probabilities.argmax())
        return Prediction(
            self.class_names[best], float(probabilities[best]), probabilities, self.class_names
        )
