"""The CUDA provider, as far as a machine without a GPU can tell; tests/gpu has the rest."""

import sys
from pathlib import Path

import pytest

from capt_deploy.backends import create
from capt_deploy.backends.onnxruntime import import_library
from capt_deploy.driver import gpu_problem
from capt_deploy.errors import UnavailableError

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()
pytestmark = pytest.mark.skipif(gpu_problem() is None, reason="there is a GPU here")


def with_provider() -> bool:
    return "CUDAExecutionProvider" in import_library().get_available_providers()


@pytest.mark.skipif(not with_provider(), reason="this onnxruntime is for the CPU alone")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"backend onnxruntime-cuda: .*driver"):
        create("onnxruntime-cuda", ONNX, "fp32")


@pytest.mark.skipif(not with_provider(), reason="this onnxruntime is for the CPU alone")
@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name")
def test_a_provider_that_silently_gives_way_to_the_cpu_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capt_deploy.backends.choice.gpu_problem", lambda: None)
    monkeypatch.setattr("capt_deploy.backends.onnxruntime_cuda.gpu_name", lambda _: "a GPU")
    with pytest.raises(UnavailableError) as caught:
        create("onnxruntime-cuda", ONNX, "fp32")
    message = str(caught.value)
    assert "expected CUDAExecutionProvider, found CPUExecutionProvider: " in message
    assert ".so" in message or "does not start" in message
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert capfd.readouterr().out == ""  # the library itself would print there
