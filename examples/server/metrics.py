"""Metrics for Prometheus, in a registry of their own, so that one process can hold several apps."""

import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from capt_deploy.backends.base import Backend, Outputs
from capt_deploy.confidence.monitor import ALARM, MonitorSummary
from capt_deploy.core.version import __version__
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.prediction import Prediction

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
_WINDOW = 20_000  # images after which the comparison begins anew
_VERDICTS = {"steady": 0.0, "watch": 1.0, "shifted": 2.0}
_WATCHED: dict[str, tuple[str, Callable[[MonitorSummary], float | None]]] = {
    "capt_shift": (
        "Shift of predictions since the validation images: 0 steady, 1 watch, 2 shifted.",
        lambda seen: _VERDICTS.get(seen.verdict),
    ),
    "capt_confidence_psi": (
        "Population stability index of confidences; above 0.25, and chance, they have shifted.",
        lambda seen: seen.confidence_psi,
    ),
    "capt_confidence_psi_by_chance": (
        "PSI that this few images exceed once in a thousand without a shift.",
        lambda seen: seen.confidence.chance if seen.confidence else None,
    ),
    "capt_class_psi": (
        "Population stability index of predicted classes.",
        lambda seen: seen.class_psi,
    ),
    "capt_class_psi_by_chance": (
        "PSI that this few images exceed once in a thousand without a shift.",
        lambda seen: seen.classes.chance if seen.classes else None,
    ),
    "capt_familiarity_evidence": (
        f"Evidence that photos are of another kind than before; {ALARM:,.0f} is an alarm.",
        lambda seen: seen.evidence,
    ),
    "capt_rejection_rate": ("Share of images rejected.", lambda seen: seen.rejection_rate),
    "capt_expected_rejection_rate": (
        "Share of validation images rejected.",
        lambda seen: seen.expected_rejection_rate,
    ),
}
Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


class Metrics:
    """The metrics of a server with one classifier."""

    def __init__(self, classifier: Classifier) -> None:
        """Start counting, batches of `classifier` included."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "capt_requests", "Requests to /predict.", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "capt_request_seconds",
            "Seconds from request to answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_sizes = Histogram(
            "capt_batch_size", "Images run at once.", buckets=_BATCHES, registry=registry
        )
        self.batch_seconds = Histogram(
            "capt_batch_seconds", "Seconds that a batch takes.", buckets=_SECONDS, registry=registry
        )
        self.waiting = Gauge("capt_waiting_images", "Images not yet answered.", registry=registry)
        self.confidence = Histogram(
            "capt_confidence",
            "Confidence of the most probable class.",
            buckets=_TENTHS,
            registry=registry,
        )
        self.predicted = Counter(
            "capt_predicted", "Images by most probable class.", ["label"], registry=registry
        )
        self._watch(classifier)
        info = Gauge(
            "capt_info",
            "Version, backend, device and precision.",
            ["version", "backend", "device", "precision"],
            registry=registry,
        )
        backend = classifier.backend
        info.labels(__version__, backend.name, backend.device, classifier.precision).set(1)
        classifier.backend = _CountedBackend(backend, self)

    def _watch(self, classifier: Classifier) -> None:
        """Show how predictions differ from those of the validation images; NaN if unknown."""
        self._monitor, self._watched = classifier.monitor(), 0

        def read(get: Callable[[MonitorSummary], float | None]) -> float:
            value = get(self._monitor.summary())
            return math.nan if value is None else value

        for name, (words, get) in _WATCHED.items():
            Gauge(name, words, registry=self.registry).set_function(partial(read, get))

    def count(self, prediction: Prediction) -> None:
        """Count one answer."""
        self._watched += 1
        if self._watched % _WINDOW == 0:  # a shift after a million images would not show otherwise
            self._monitor.reset()
        self.confidence.observe(prediction.confidence)
        self.predicted.labels(prediction.label).inc()


class _CountedBackend:
    """A backend that measures the size and the duration of its batches."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self.name, self.device = backend.name, backend.device
        self._backend, self._metrics = backend, metrics

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        self._metrics.batch_sizes.observe(len(images))
        with self._metrics.batch_seconds.time():
            return self._backend.run(images)

    def close(self) -> None:
        self._backend.close()


class MeasuredRequests:
    """ASGI middleware that counts the requests to one path by the status of their answer."""

    def __init__(self, app: App, metrics: Metrics, path: str) -> None:
        self._app, self._metrics, self._path = app, metrics, path

    async def __call__(self, scope: Message, receive: App, send: App) -> None:
        """Pass a request on and note the status of the answer."""
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()  # 500 unless an answer starts

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)
