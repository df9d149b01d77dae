"""Fixed buffers: what ONNX Runtime says through them is what it says without them."""

from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends import onnxruntime_cuda
from capt_deploy.backends.base import run_in_parts
from capt_deploy.backends.onnxruntime import OnnxRuntime, start_session
from capt_deploy.backends.onnxruntime_cuda import BoundSession
from capt_deploy.core.errors import BackendError, UnavailableError

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> BoundSession:
    """Return a session whose buffers are on the CPU."""

    def no_device(ordinal: int) -> None:
        raise UnavailableError("no Python package for CUDA")

    monkeypatch.setattr(onnxruntime_cuda, "open_device", no_device)
    monkeypatch.setattr(BoundSession, "kind", "cpu")
    session = BoundSession(0)
    graph = start_session(ONNX, "ORT_ENABLE_ALL", threads=1)
    session.attach(graph, (1, 4, 8), graphs=False)
    return session


def test_every_batch_says_the_same_as_without_buffers(bound: BoundSession) -> None:
    free = OnnxRuntime(ONNX, "fp32")
    for size in (8, 3, 1, 5, 8, 40):
        found = run_in_parts(bound.run, PIXELS[-size:], bound.largest)
        for name, own in zip(found._fields, found, strict=True):
            expected = getattr(free.run(PIXELS[-size:]), name)
            np.testing.assert_allclose(own, expected, atol=1e-5)


def test_outputs_stay_when_the_buffers_are_used_again(bound: BoundSession) -> None:
    first = bound.run(PIXELS[:3])
    kept = [column.copy() for column in first]
    bound.run(PIXELS[10:14])
    for column, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(column, copy)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32)]
)
def test_other_pixels_are_refused(bound: BoundSession, images: np.ndarray) -> None:
    with pytest.raises(BackendError, match=r"expected uint8 pixels \(batch, 16, 16, 3\), came"):
        bound.run(images)


def test_without_a_package_for_cuda_times_are_unavailable(bound: BoundSession) -> None:
    with pytest.raises(UnavailableError, match="no Python package for CUDA"):
        bound.time(PIXELS[:1], 1)
