"""Fixed buffers: what ONNX Runtime says through them is what it says without them."""

from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends import in_parts
from capt_deploy.backends.bound_session import BoundSession, Place
from capt_deploy.backends.onnxruntime import OnnxRuntime, start_session
from capt_deploy.core.errors import BackendError

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def on_cpu(batches: tuple[int, int, int] = (1, 4, 8)) -> BoundSession:
    """Everything but the GPU is the same."""
    place = Place("cpu", 0, lambda shape: np.empty(shape, np.uint8))
    session = start_session(ONNX, "ORT_ENABLE_ALL", threads=1)
    return BoundSession(session, place, batches, graphs=False)


def test_every_batch_says_the_same_as_without_buffers() -> None:
    bound, free = on_cpu(), OnnxRuntime(ONNX, "fp32")
    for size in (8, 3, 1, 5, 8, 40):
        found = in_parts(bound.run, PIXELS[-size:], bound.largest)
        for name, own in zip(found._fields, found, strict=True):
            expected = getattr(free.run(PIXELS[-size:]), name)
            np.testing.assert_allclose(own, expected, atol=1e-5)


def test_what_was_said_stays_when_the_buffers_are_used_again() -> None:
    bound = on_cpu()
    first = bound.run(PIXELS[:3])
    kept = [column.copy() for column in first]
    bound.run(PIXELS[10:14])
    for column, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(column, copy)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32)]
)
def test_other_pixels_are_refused(images: np.ndarray) -> None:
    with pytest.raises(BackendError, match=r"expected uint8 pixels \(batch, 16, 16, 3\), came"):
        on_cpu().run(images)
