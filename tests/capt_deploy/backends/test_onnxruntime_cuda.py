"""The CUDA provider, as far as a machine without a GPU can tell; tests/gpu has the rest."""

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capt_deploy.backends import onnxruntime_cuda
from capt_deploy.backends.base import DeviceTimed
from capt_deploy.backends.onnxruntime import import_library, start_session
from capt_deploy.backends.onnxruntime_cuda import BoundSession, OnnxRuntimeCuda
from capt_deploy.backends.spec import ONNXRUNTIME_CUDA
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_problem
from tests.capt_deploy.backends.tensorrt.host_device import HostDevice

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()
pytestmark = pytest.mark.skipif(gpu_problem() is None, reason="there is a GPU here")


def with_provider() -> bool:
    return "CUDAExecutionProvider" in import_library().get_available_providers()


@pytest.mark.skipif(not with_provider(), reason="this onnxruntime is for the CPU alone")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"backend onnxruntime-cuda: .*driver"):
        ONNXRUNTIME_CUDA.open(ONNX, "fp32")


@pytest.mark.skipif(not with_provider(), reason="this onnxruntime is for the CPU alone")
@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name")
def test_a_provider_that_silently_gives_way_to_the_cpu_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("capt_deploy.backends.spec.gpu_problem", lambda: None)
    monkeypatch.setattr("capt_deploy.backends.onnxruntime_cuda.gpu_name", lambda _: "a GPU")
    with pytest.raises(UnavailableError) as caught:
        ONNXRUNTIME_CUDA.open(ONNX, "fp32")
    message = str(caught.value)
    assert "expected CUDAExecutionProvider, found CPUExecutionProvider: " in message
    assert ".so" in message or "does not start" in message
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert capfd.readouterr().out == ""  # the library itself would print there


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The host's memory as the GPU's, and sessions that compute on the CPU."""
    device = HostDevice()

    def on_cpu(onnx: bytes, level: str, folder: Path | None, *, providers: Any) -> Any:
        return start_session(onnx, level, folder, threads=1)

    monkeypatch.setattr(onnxruntime_cuda, "gpu_name", lambda ordinal: "the host")
    monkeypatch.setattr(onnxruntime_cuda, "open_device", lambda ordinal: device)
    monkeypatch.setattr(onnxruntime_cuda, "start_session", on_cpu)
    monkeypatch.setattr(onnxruntime_cuda, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(BoundSession, "kind", "cpu")
    return device


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_what_nobody_closes_is_freed_when_nobody_holds_it(device: HostDevice) -> None:
    backend = OnnxRuntimeCuda(ONNX, "fp32")
    assert len(backend.run(pixels(40)).logits) == 40
    assert device.leaks
    del backend
    gc.collect()
    assert device.leaks == []


def test_closing_is_final_and_may_be_repeated(device: HostDevice) -> None:
    backend = OnnxRuntimeCuda(ONNX, "fp32")
    backend.close()
    backend.close()
    assert device.leaks == []
    with pytest.raises(BackendError, match="closed"):
        backend.run(pixels(1))


def test_a_failed_try_leaves_nothing_to_the_next_one(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = BoundSession._start, []

    def start_without_graphs(session: Any, buffers: Any) -> None:
        if session._graphs:
            left.append(sum(str(name).startswith("pinned") for name in device.leaks))
            raise BackendError("no capture")
        start(session, buffers)

    monkeypatch.setattr(BoundSession, "_start", start_without_graphs)
    with pytest.warns(UserWarning, match="runs without CUDA graphs, .*: no capture"):
        backend = OnnxRuntimeCuda(ONNX, "fp32")
    assert left == [1, 1]
    backend.close()
    assert device.leaks == []


def test_where_every_try_fails_nothing_is_left(
    device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Any, buffers: Any) -> None:
        raise BackendError("out of memory")

    monkeypatch.setattr(BoundSession, "_start", fail)
    with pytest.raises(BackendError, match="out of memory"):
        OnnxRuntimeCuda(ONNX, "fp32")
    assert device.leaks == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_copy_frees_nothing(device: HostDevice) -> None:
    backend = OnnxRuntimeCuda(ONNX, "fp32")
    held = len(device.leaks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads
        child = os.fork()
    if child == 0:  # only `_exit` may follow: this is still the test run
        backend.close()
        backend.__dict__.clear()
        del backend
        os._exit(0 if len(device.leaks) == held else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    backend.close()


def test_times_are_of_single_launches(device: HostDevice) -> None:
    backend = OnnxRuntimeCuda(ONNX, "fp32")
    assert isinstance(backend, DeviceTimed)
    assert not backend.queued
    assert len(backend.time_on_device(pixels(3), 4)) == 4
    backend.close()
    assert device.leaks == []
