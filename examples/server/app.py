"""The routes: `/predict`, `/healthz`, `/readyz`, `/metrics`, and a page at `/`."""

import asyncio
import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from capt_deploy.core.errors import BackendError, BusyError, ImageError
from capt_deploy.core.version import __version__
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.prediction import Prediction
from examples.server.bodies import BODY, EncodedImage, read_images
from examples.server.limits import Limits, PixelShare, RefusedError, TokenBuckets
from examples.server.metrics import MeasuredRequests, Metrics

PAGE = Path(__file__).with_name("page.html")
_READY_SECONDS = 5.0
_LIMITS = Limits()


def make_app(classifier: Classifier, limits: Limits = _LIMITS) -> FastAPI:
    """Return the app around a classifier, which the caller closes afterwards."""
    # FastAPI's own pages of documentation fetch scripts from elsewhere.
    app = FastAPI(title="capt", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(classifier)
    door, parsing = Door(limits), asyncio.Semaphore(1)
    app.state.door = door
    app.add_middleware(MeasuredRequests, metrics=metrics, path="/predict")
    _explain_errors(app)

    @app.post("/predict", openapi_extra=BODY)
    async def predict(request: Request, top_k: Annotated[int, Query(ge=1)] = 5) -> dict[str, Any]:
        with door.entered(request) as share:
            images = await read_images(request, limits, parsing)
            predictions = await _answers(classifier, images, share, metrics)
        return {"predictions": [_to_dict(prediction, top_k) for prediction in predictions]}

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {
            "status": "ok",
            "version": __version__,
            "backend": classifier.backend.name,
            "device": classifier.backend.device,
            "precision": classifier.precision,
            "classes": len(classifier.class_names),
            "limits": {"body_bytes": limits.body_bytes, "images": limits.images},
        }

    @app.get("/readyz")
    async def readyz(request: Request) -> dict[str, str]:
        with door.entered(request):  # a check costs as much as a request
            await _try_out(classifier)
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _show_page(app)
    return app


class Door:
    """Limits how many requests are under way, in all and for each client, and their rate.

    `cut_off` counts the requests that the server ended without answering.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self.cut_off = limits, 0
        self._inside: Counter[str] = Counter()  # requests of each client that has any
        self._shares: dict[str, PixelShare] = {}  # of the same clients
        self._buckets = TokenBuckets(limits.rate, limits.burst)

    @contextmanager
    def entered(self, request: Request) -> Iterator[PixelShare]:
        """Count a request as under way, and yield its client's share of the decoding.

        Raises:
            RefusedError: 429 if the client has too many requests, 503 if all clients have.
        """
        client = request.client.host if request.client else ""
        if seconds := self._buckets.seconds_to_wait(client):
            whole = math.ceil(seconds)
            raise RefusedError(429, f"too many requests; wait {whole} s", whole)
        if self._inside.total() >= self._limits.requests:
            raise RefusedError(503, "busy: too many requests at once; try again", 1)
        if self._inside[client] >= self._limits.requests_of_a_client:
            raise RefusedError(429, "too many requests of yours at once; try again", 1)
        self._inside[client] += 1
        if client not in self._shares:
            self._shares[client] = PixelShare(self._limits.pixels_of_a_client)
        try:
            yield self._shares[client]
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
        finally:
            self._inside[client] -= 1
            if not self._inside[client]:
                del self._inside[client], self._shares[client]  # memory does not grow with clients


async def _answers(
    classifier: Classifier, images: list[EncodedImage], share: PixelShare, metrics: Metrics
) -> list[Prediction]:
    """Classify the images of a request, all of them or none."""
    futures: list[asyncio.Future[Prediction]] = []
    metrics.waiting.inc(len(images))
    try:
        for image in images:
            await share.take(image.pixels)
            try:
                future = asyncio.wrap_future(classifier.submit(image.data))
            except BaseException:
                share.give_back(image.pixels)
                raise
            future.add_done_callback(partial(share.give_back, image.pixels))
            futures.append(future)
        answers = await asyncio.gather(*futures, return_exceptions=True)
    except BusyError:
        for future in futures:
            future.cancel()
        raise RefusedError(503, "busy: too many images wait; try again", 1) from None
    finally:
        metrics.waiting.dec(len(images))
    predictions = []
    for number, answer in enumerate(answers):
        if isinstance(answer, ImageError):
            raise RefusedError(422, f"image {number}: {answer}")
        if isinstance(answer, BaseException):
            raise answer
        metrics.count(answer)
        predictions.append(answer)
    return predictions


async def _try_out(classifier: Classifier) -> None:
    """Run the graph once, without counting the answer in the monitor."""
    pixels = classifier.preprocess(np.zeros((8, 8, 3), np.uint8))[np.newaxis]
    try:
        answer = asyncio.to_thread(classifier.backend.run, pixels)
        await asyncio.wait_for(answer, _READY_SECONDS)
    except (BackendError, TimeoutError) as cause:
        raise RefusedError(503, f"not ready: {cause or 'no answer in time'}", 1) from None


def _to_dict(prediction: Prediction, top_k: int) -> dict[str, Any]:
    top = [{"label": label, "probability": share} for label, share in prediction.top(top_k)]
    partner = prediction.confused_with
    return {
        "label": prediction.label,
        "confidence": prediction.confidence,
        "top": top,
        "prediction_set": prediction.prediction_set,
        "rejected": prediction.rejected,
        "familiarity": prediction.familiarity,
        "confused_with": partner and {"label": partner[0], "probability": partner[1]},
    }


def _explain_errors(app: FastAPI) -> None:
    """Answer every error in the same form; tracebacks are in the log only."""

    def add(kind: type[Exception], explain: Callable[[Any], RefusedError]) -> None:
        async def handler(_: Request, error: Exception) -> Response:
            refusal = explain(error)
            headers = {}
            if refusal.retry_after is not None:
                headers["Retry-After"] = str(refusal.retry_after)
            if refusal.status == 400:  # where a body ends is unsure, and so what follows
                headers["Connection"] = "close"
            return JSONResponse({"error": refusal.reason}, refusal.status, headers)

        app.add_exception_handler(kind, handler)

    add(RefusedError, lambda error: error)
    add(HTTPException, lambda error: RefusedError(error.status_code, error.detail))
    add(RequestValidationError, lambda error: RefusedError(422, _invalid_fields(error)))
    add(Exception, lambda _: RefusedError(500, "the server failed; its log says why"))


def _invalid_fields(error: RequestValidationError) -> str:
    return "; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in error.errors())


def _show_page(app: FastAPI) -> None:
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/")
    async def root() -> Response:
        return HTMLResponse(page, headers=headers)


def _policy(page: str) -> str:
    """Return a content security policy that allows only the page's own script and style."""
    hashes = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        f"img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'"
    )
