"""Choosing a backend: the fastest that works, and a reason for every faster one that does not."""

import sys
import warnings
from pathlib import Path

import pytest

from capt_deploy import BackendError, BundleError, Classifier
from capt_deploy.backends.choice import first_that_works
from capt_deploy.backends.onnxruntime import cuda_provider_problem, import_library
from capt_deploy.backends.spec import (
    BACKENDS,
    ONNXRUNTIME_CPU,
    TENSORRT_RTX,
    BackendSpec,
    backend_names,
    find_backends,
)
from capt_deploy.core.errors import UnavailableError
from capt_deploy.core.gpus import gpu_problem

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.capt"
without_gpu = pytest.mark.skipif(gpu_problem() is None, reason="there is a GPU here")


@pytest.fixture
def all_seem_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be ruled out before it is started."""
    monkeypatch.setattr(BackendSpec, "problem", lambda spec: None)


@pytest.fixture
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capt_deploy.backends.choice.nvidia_gpu_is_here", lambda: False)


def starting(**errors: Exception):  # type: ignore[no-untyped-def]
    """Return a function that starts all but some backends, and what was tried."""
    tried: list[str] = []

    def start(spec: BackendSpec) -> str:
        tried.append(spec.name)
        if spec.name.replace("-", "_") in errors:
            raise errors[spec.name.replace("-", "_")]
        return f"running {spec.name}"

    return start, tried


def test_the_first_that_starts_is_taken_and_no_other_is_tried(all_seem_usable: None) -> None:
    start, tried = starting(tensorrt=BackendError("no such GPU"))
    with pytest.warns(UserWarning, match="no such GPU"):
        started, skipped = first_that_works(BACKENDS, start)
    assert started == "running tensorrt-rtx"
    assert tried == ["tensorrt", "tensorrt-rtx"]
    assert skipped == {"tensorrt": "no such GPU"}


def test_whatever_a_library_for_gpus_raises_is_a_reason(
    all_seem_usable: None, no_gpu_here: None
) -> None:
    errors = {"tensorrt": OSError("libnvinfer"), "onnxruntime_cuda": AttributeError("Foo")}
    start, _ = starting(tensorrt_rtx=RuntimeError("cuInit"), **errors)
    started, skipped = first_that_works(BACKENDS, start)
    assert started == f"running {BACKENDS[3].name}"
    assert skipped == {
        "tensorrt": "OSError: libnvinfer",
        "tensorrt-rtx": "RuntimeError: cuInit",
        "onnxruntime-cuda": "AttributeError: Foo",
    }


def test_an_unusable_bundle_is_not_tried_elsewhere(all_seem_usable: None) -> None:
    start, tried = starting(tensorrt=BundleError("changed"))
    with pytest.raises(BundleError, match="changed"):
        first_that_works(BACKENDS, start)
    assert tried == ["tensorrt"]


def test_a_single_backend_raises_its_own_error_and_nothing_more() -> None:
    error = RuntimeError("a bug")
    start, _ = starting(onnxruntime_cpu=error)
    with pytest.raises(RuntimeError) as caught:
        first_that_works([ONNXRUNTIME_CPU], start)
    assert caught.value is error


def test_where_none_works_the_error_is_the_last_ones_with_the_reasons_of_the_others(
    all_seem_usable: None,
) -> None:
    start, _ = starting(
        onnxruntime_cuda=BackendError("out of memory"), onnxruntime_cpu=UnavailableError("bf16")
    )
    with pytest.raises(UnavailableError, match=r"^bf16 .*onnxruntime-cuda: out of memory"):
        first_that_works(find_backends("onnxruntime"), start)


def test_falling_back_to_the_cpu_beside_a_gpu_is_warned_of(
    all_seem_usable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capt_deploy.backends.choice.nvidia_gpu_is_here", lambda: True)
    start, _ = starting(onnxruntime_cuda=BackendError("libcudnn is missing"))
    with pytest.warns(UserWarning, match="GPU is here, but the CPU is used: .*libcudnn is missing"):
        first_that_works(find_backends("onnxruntime"), start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_that_works([ONNXRUNTIME_CPU], start)  # asked for by name


def names(name: str) -> list[str]:
    return [spec.name for spec in find_backends(name)]


def test_names_stand_for_backends() -> None:
    assert find_backends("auto") == BACKENDS
    assert names("onnxruntime") == ["onnxruntime-cuda", "onnxruntime-cpu"]
    assert all(find_backends(spec.name) == (spec,) for spec in BACKENDS)
    assert set(backend_names()) == {"auto", "onnxruntime", *names("auto")}
    with pytest.raises(BackendError, match="'cuda': expected one of auto, "):
        find_backends("cuda")


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("tensorrt", ["fp32", "fp16", "int8"], "fp16"),
        ("tensorrt-rtx", ["fp32", "bf16"], "bf16"),
        ("onnxruntime-cuda", ["bf16", "fp32"], "fp32"),
        ("onnxruntime-cpu", ["fp16", "fp32"], "fp32"),
    ],
)
def test_each_backend_has_the_precision_that_suits_it(
    name: str, available: list[str], expected: str
) -> None:
    (spec,) = find_backends(name)
    assert spec.preferred(available) == expected


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capt_deploy.backends.spec.find_spec", lambda _: None)
    assert "pip install '.[tensorrt-rtx]'" in str(TENSORRT_RTX.problem())
    assert "pip install onnxruntime" in str(ONNXRUNTIME_CPU.problem())


def test_a_package_for_the_cpu_alone_is_told_from_one_with_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = import_library()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    problem = str(cuda_provider_problem())
    assert "expected CUDAExecutionProvider, found CPUExecutionProvider" in problem
    assert "pip install onnxruntime-gpu" in problem
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "missing" in str(cuda_provider_problem())


@without_gpu
@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_without_a_gpu_the_cpu_is_taken_and_every_skip_has_its_reason(backend: str) -> None:
    classifier = Classifier.load(GOLDEN, backend)
    assert classifier.backend.name in ("onnxruntime", "openvino")[: 2 if backend == "auto" else 1]
    assert classifier.backend.device == "cpu"
    assert list(classifier.skipped) == [s.name for s in find_backends(backend) if s.needs_gpu]
    assert all(classifier.skipped.values())


@without_gpu
@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def test_a_gpu_asked_for_by_name_is_an_error_where_there_is_none(backend: str) -> None:
    with pytest.raises(UnavailableError, match=r"expected|missing|driver"):
        Classifier.load(GOLDEN, backend)


def test_the_cpu_asked_for_by_name_skips_nothing() -> None:
    assert Classifier.load(GOLDEN, "onnxruntime-cpu").skipped == {}


def test_a_gpu_backend_that_fails_is_warned_of_where_another_one_works(
    all_seem_usable: None,
) -> None:
    start, _ = starting(tensorrt=BackendError("the build ran out of memory"))
    with pytest.warns(UserWarning, match="tensorrt-rtx is used, as tensorrt: the build ran out"):
        _, skipped = first_that_works(BACKENDS, start)
    assert skipped == {"tensorrt": "the build ran out of memory"}
