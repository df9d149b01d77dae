from pathlib import Path

import pytest

from capt_deploy.backends.spec import BACKENDS, find_backends
from capt_deploy.core.errors import BundleError
from capt_deploy.core.gpus import Driver, Gpu
from capt_deploy.doctor.diagnose import Facts, Finding, diagnose, fix_of, problems
from capt_deploy.doctor.probe import ProbeResult

ADA, HOPPER, ORIN = Gpu("NVIDIA L4", 89), Gpu("NVIDIA H100", 90), Gpu("Orin", 87)
APT = "sudo apt-get install python3-libnvinfer"
NO_GPU = Driver((), "no driver")
ORT, ORT_GPU = {"onnxruntime": "1"}, {"onnxruntime-gpu": "1"}
TRT = {"tensorrt": "1", "tensorrt-rtx": "1"}


def here(*gpus):
    return Driver(gpus, None)


@pytest.mark.parametrize(
    ("name", "packages", "driver", "said"),
    [
        ("tensorrt", TRT, NO_GPU, "install its driver"),
        ("onnxruntime-cuda", ORT, NO_GPU, "install its driver"),
        ("tensorrt", {}, here(ADA), "pip install '.[tensorrt]'"),
        ("tensorrt-rtx", {}, here(ADA), "pip install '.[tensorrt-rtx]'"),
        ("tensorrt-rtx", {}, here(HOPPER), "not made for this GPU: pip install '.[tensorrt]'"),
        ("tensorrt-rtx", {}, here(HOPPER, ADA), "pip install '.[tensorrt-rtx]'"),
        ("tensorrt", TRT, here(HOPPER), "pip install cuda-python"),
        ("tensorrt", TRT | {"pycuda": "1"}, here(ADA), "--force-reinstall tensorrt"),
        ("tensorrt-rtx", TRT | {"cuda-bindings": "1"}, here(ADA), "--force-reinstall tensorrt-rtx"),
        ("onnxruntime-cuda", ORT, here(ADA), "pip uninstall -y onnxruntime; pip install 'onnxrun"),
        ("onnxruntime-cuda", ORT_GPU, here(ADA), "'onnxruntime-gpu[cuda,cudnn]'"),
        ("onnxruntime-cuda", ORT | ORT_GPU, here(ADA), "-y onnxruntime onnxruntime-gpu"),
        ("onnxruntime-cpu", ORT | ORT_GPU, NO_GPU, "-y onnxruntime onnxruntime-gpu"),
        ("onnxruntime-cpu", ORT_GPU, NO_GPU, "--force-reinstall onnxruntime-gpu"),
        ("onnxruntime-cpu", {}, NO_GPU, "pip install onnxruntime"),
    ],
)
def test_there_is_one_line_that_would_fix_it(monkeypatch, name, packages, driver, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (spec,) = find_backends(name)
    line = fix_of(spec, Facts(packages, driver))
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "packages", "found", "said"),
    [
        ("tensorrt", {}, False, "sudo apt-get install python3-libnvinfer"),
        ("tensorrt", {}, True, "pip install 'cuda-python<13'"),
        ("tensorrt", {"pycuda": "1"}, True, "sudo apt-get install --reinstall python3-libnvinfer"),
        ("tensorrt-rtx", {}, False, "not made for this GPU: sudo apt-get install python3-libnv"),
        ("onnxruntime-cuda", ORT, False, "use the backend tensorrt"),
    ],
)
def test_on_a_jetson_nothing_replaces_what_jetpack_brings(monkeypatch, name, packages, found, said):
    for place in ("core.install", "backends.tensorrt.backend", "backends.onnxruntime"):
        monkeypatch.setattr(f"capt_deploy.{place}.jetson_linux", lambda: "36.4.3")
    monkeypatch.setattr("capt_deploy.core.install.tensorrt_hint", lambda: APT)
    monkeypatch.setattr("capt_deploy.backends.tensorrt.backend.find_spec", lambda _: found or None)
    monkeypatch.setattr(
        "capt_deploy.backends.tensorrt.backend.cuda_hint", lambda: "pip install 'cuda-python<13'"
    )
    (spec,) = find_backends(name)
    assert said in fix_of(spec, Facts(packages, here(ORIN)))


def test_gpus_that_only_the_environment_hides_are_shown_again(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = Facts(ORT_GPU, Driver((ADA,), "the driver shows no GPU"))
    assert fix_of(find_backends("onnxruntime-cuda")[0], facts) == "unset CUDA_VISIBLE_DEVICES"


def finding(name, usable):
    return Finding(name, usable, "cpu" if usable else None, None, None if usable else "do x", 0)


def test_what_is_wrong_whichever_backend_is_used():
    both = ORT | ORT_GPU
    only_cpu = tuple(finding(spec.name, not spec.needs_gpu) for spec in BACKENDS)
    none = tuple(finding(spec.name, False) for spec in BACKENDS)
    assert problems(Facts(ORT, NO_GPU), only_cpu) == []
    (conflict,) = problems(Facts(both, NO_GPU), only_cpu)
    assert "overwrite each other's files" in conflict
    (slow,) = problems(Facts(ORT_GPU, here(ADA)), only_cpu)
    assert slow == "there is an NVIDIA GPU, but only the CPU works: do x"
    (dead,) = problems(Facts(ORT, NO_GPU), none)
    assert dead.startswith("no backend works: pip install")


def test_every_backend_is_examined_and_one_works():
    diagnosis = diagnose()
    assert [one.name for one in diagnosis.backends] == [spec.name for spec in BACKENDS]
    assert diagnosis.chosen is not None
    for one in diagnosis.backends:
        assert one.usable == (one.device is not None) == (one.reason is None) == (one.fix is None)
    assert diagnosis.versions["numpy"]


def test_nothing_works_if_every_trial_fails():
    diagnosis = diagnose(attempt=lambda name, bundle: ProbeResult(None, "no luck", 0.1))
    assert diagnosis.chosen is None
    assert diagnosis.to_dict()["chosen"] is None
    assert diagnosis.backends[-1].reason == "no luck"
    assert "no backend works" in diagnosis.problems[-1]


def test_a_damaged_bundle_is_an_error_of_its_own(tmp_path):
    with pytest.raises(BundleError, match="no such bundle"):
        diagnose(tmp_path / "nowhere.capt")
    lone = tmp_path / "model.onnx"
    lone.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="carries no manifest"):
        diagnose(Path(lone))


@pytest.mark.parametrize(
    ("devices", "chosen", "measured"),
    [
        ({"onnxruntime-cpu": "cpu"}, "onnxruntime-cpu", ()),
        (
            {"openvino": "cpu", "onnxruntime-cpu": "cpu"},
            "openvino",
            ("openvino", "onnxruntime-cpu"),
        ),
        ({"tensorrt": "cuda:0 (Orin)", "onnxruntime-cpu": "cpu"}, "tensorrt", ()),
    ],
)
def test_on_a_cpu_auto_has_a_choice(monkeypatch, devices, chosen, measured):
    monkeypatch.setattr("capt_deploy.doctor.diagnose.find_driver", lambda: here(ADA))
    tried = diagnose(attempt=lambda name, _: ProbeResult(devices.get(name), "no", 0.1))
    assert (tried.chosen, tried.measured) == (chosen, measured)
