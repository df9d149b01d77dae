"""Plain open_clip in torch with its preprocessing, as people use it without this package.

Text features are computed beforehand; nothing is switched off, and nothing else is tuned.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from capt_deploy.backends.spec import find_backends, library_packages
from capt_deploy.bench.cases import full_batches
from capt_deploy.bench.images import Photos
from capt_deploy.bench.measure import Case, Memory, Threads, Turn
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.console import say
from capt_deploy.core.machine import installed, versions
from capt_deploy.serving.classifier import Classifier

_ROW_NAMES = {False: "open_clip eager", True: "open_clip compiled"}


class PlainOpenClip:
    """A model with the text features of a bundle made from it, so that both name the same label."""

    def __init__(self, model: Path, bundle: Path, device: str, precision: str = "fp32") -> None:
        opened = open_bundle(bundle)
        texts = opened.text_embeddings()["text_embeddings"]
        self.class_names = opened.manifest.class_names
        network, _, self.transform = open_clip.create_model_and_transforms(
            f"local-dir:{model}", precision="fp16" if precision == "fp16" else "fp32", device=device
        )
        self.autocast = precision.endswith("autocast")
        self.network = network.eval()
        self.device = torch.device(device)
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.texts = torch.from_numpy(texts).to(self.device, self.dtype)
        self.scale = float(network.logit_scale.detach().exp())
        self.encode: Callable[[Tensor], Tensor] = network.encode_image

    def compile(self) -> None:
        """Let torch compile the visual side."""
        self.encode = torch.compile(self.network.encode_image)

    def load(self, encoded: Sequence[bytes]) -> Tensor:
        """Return the input of a batch, as open_clip's own transform makes it."""
        images = [Image.open(io.BytesIO(data)) for data in encoded]
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return probabilities, (batch, classes), on the device of the model."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features = self.encode(images.to(self.device, self.dtype))
        features = functional.normalize(features.to(self.dtype), dim=-1)
        return (self.scale * features @ self.texts.T).softmax(dim=-1)

    def label(self, encoded: Sequence[bytes]) -> list[str]:
        """Return the label of each image."""
        best = self.probabilities(self.load(encoded)).argmax(dim=-1).tolist()
        return [self.class_names[index] for index in best]


def same_labels(
    model: Path, bundle: Path, device: str, photos: Photos, rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the share of the photos, 0-1, for which a measured graph gives open_clip's label.

    By `backend precision`.
    """
    plain = PlainOpenClip(model, bundle, device).label(photos.encoded)
    shares: dict[str, float] = {}
    for row in rows:
        backend, precision = row["backend"], row["precision"]
        if backend.startswith("open_clip"):
            continue
        on_gpu = row["device"] != "cpu"  # the name may stand for several backends
        backend = next(s.name for s in find_backends(backend) if s.needs_gpu == on_gpu)
        key = f"{backend} {precision}"
        if key in shares:
            continue
        with Classifier.load(bundle, backend, precision) as classifier:
            labels = [prediction.label for prediction in classifier.predict(photos.encoded)]
        shares[key] = sum(a == b for a, b in zip(labels, plain, strict=True)) / len(labels)
    return shares


def plain_cases(
    make: Callable[[], PlainOpenClip],
    precision: str,
    compiled: bool,
    batches: Sequence[int],
    scopes: Sequence[str],
    photos: Photos,
) -> Iterator[Case]:
    """Yield a case for each scope and batch; none, with a message, where torch cannot compile."""
    before = Memory.now()
    plain = make()
    cuda = plain.device.type == "cuda"
    if compiled:
        try:
            plain.compile()
            plain.label(photos.encoded[:1])
        except Exception as cause:  # no compiler, no Triton, an operator it does not know
            reason = str(cause).splitlines() or [type(cause).__name__]
            say(f"left out {_ROW_NAMES[True]}: {reason[0]}")
            return
    name = f"cuda:0 ({torch.cuda.get_device_name(0)})" if cuda else "cpu"
    for scope in scopes:
        if scope == "device" and not cuda:
            continue
        for batch in batches:
            yield Case(
                backend=_ROW_NAMES[compiled],
                device=name,
                precision=precision,
                batch=batch,
                scope=scope,
                run=_runs(plain, scope, full_batches(photos.encoded, batch)),
                memory_before=before,
                details={
                    "versions": {
                        **versions(library_packages()),
                        **installed(("torch", "torchvision", "open_clip_torch")),
                    },
                    "images": photos.source,
                    "queued": True if scope == "device" else None,
                    "threads": None if cuda else torch.get_num_threads(),
                },
            )


def _runs(
    plain: PlainOpenClip, scope: str, batches: Sequence[Sequence[bytes]]
) -> Callable[[int], Turn]:
    threads, number = Threads(1), count()
    if scope == "image_to_label":
        return lambda times: threads.run(
            lambda: plain.label(batches[next(number) % len(batches)]), times
        )
    images = plain.load(batches[0])
    if scope == "host":
        return lambda times: threads.run(lambda: _to_host(plain.probabilities(images)), times)
    on_device = images.to(plain.device, plain.dtype)
    return lambda times: _time_on_device(plain, on_device, times)


def _to_host(probabilities: Tensor) -> Any:
    return np.asarray(probabilities.float().cpu())


def _time_on_device(plain: PlainOpenClip, images: Tensor, times: int) -> Turn:
    """Time runs between CUDA events; the images are on the GPU already."""
    events: list[tuple[Any, Any]] = []
    for _ in range(times):
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        plain.probabilities(images)
        second.record()
        events.append((first, second))
    torch.cuda.synchronize()
    latencies = [first.elapsed_time(second) for first, second in events]
    return Turn(latencies, sum(latencies) / 1000)
