"""Which of a bundle's graphs run here, and on what."""

import json
import shutil

import pytest

from capt_deploy import Classifier
from capt_deploy.backends.spec import BACKENDS, TENSORRT, BackendSpec
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.errors import BackendError, BundleError
from capt_deploy.core.gpus import gpu_problem
from capt_deploy.serving import opening
from capt_deploy.serving.opening import cpu_candidates

pytestmark = pytest.mark.skipif(gpu_problem() is None, reason="a backend on the GPU is taken")


@pytest.fixture
def installed(monkeypatch):
    """Let all backends for the CPU seem to be installed."""
    monkeypatch.setattr(BackendSpec, "problem", lambda spec: "no GPU" if spec.needs_gpu else None)


@pytest.fixture
def unmeasured(monkeypatch):
    """Refuse every trial."""
    monkeypatch.setattr(opening, "fastest", lambda *_: pytest.fail("it was measured"))


def bundle_with(golden, folder, graphs, **changes):
    """Copy a bundle and let its manifest claim other graphs, which nobody opens here."""
    shutil.copytree(golden, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (graph,), (calibration,) = manifest["graphs"].values(), manifest["calibration"].values()
    manifest["graphs"] = dict.fromkeys(graphs, graph)
    manifest["calibration"] = dict.fromkeys(graphs, calibration)
    path.write_text(json.dumps({**manifest, **changes}))
    return open_bundle(folder)


@pytest.mark.parametrize(
    ("graphs", "precision", "expected"),
    [
        (["fp32"], None, ["openvino fp32", "onnxruntime-cpu fp32"]),
        (["fp16"], None, ["openvino fp16", "onnxruntime-cpu fp16"]),
        (["bf16"], None, ["openvino bf16"]),
        (["fp32", "fp16", "int8"], None, ["openvino fp32", "onnxruntime-cpu fp32"]),
        (
            ["int8-cpu", "int8", "bf16", "fp32"],
            None,
            [
                *("openvino fp32", "onnxruntime-cpu fp32", "openvino bf16"),
                *("openvino int8-cpu", "onnxruntime-cpu int8-cpu"),
            ],
        ),
        (["fp32", "int8"], "int8", ["openvino int8", "onnxruntime-cpu int8"]),
    ],
)
def test_auto_measures_what_may_be_fastest_the_most_exact_first(
    golden, tmp_path, installed, graphs, precision, expected
):
    bundle = bundle_with(golden, tmp_path / "b.capt", graphs)
    assert [str(way) for way in cpu_candidates(bundle, BACKENDS, precision)] == expected


def test_a_precision_that_nobody_knows_runs_only_where_it_is_asked_for(golden, tmp_path, installed):
    bundle = bundle_with(golden, tmp_path / "b.capt", ["fp8"])
    assert cpu_candidates(bundle, BACKENDS, None) == []
    (first, *_) = cpu_candidates(bundle, BACKENDS, "fp8")
    assert first.precision == "fp8"


def test_a_bundle_for_cpus_alone_runs_on_no_gpu(golden, tmp_path):
    bundle = bundle_with(golden, tmp_path / "b.capt", ["int8-cpu"])
    with pytest.raises(BackendError, match=r"backend tensorrt: expected a graph in fp16.*--fp16"):
        TENSORRT.preferred(bundle.precisions)


def test_a_backend_asked_for_by_name_is_not_measured_against_others(golden, unmeasured):
    with Classifier.load(golden, "onnxruntime-cpu") as classifier:
        assert classifier.backend.name == "onnxruntime"
    with Classifier.load(golden, "onnxruntime") as classifier:
        assert classifier.backend.name == "onnxruntime"


def test_a_precision_that_the_bundle_lacks_is_refused(golden, unmeasured):
    with pytest.raises(BundleError, match="no 'int3' graph; it holds fp32"):
        Classifier.load(golden, precision="int3")


def test_auto_runs_what_the_trial_has_chosen(golden):
    with Classifier.load(golden) as classifier:
        assert classifier.backend.device == "cpu" and classifier.precision == "fp32"
        assert {*classifier.skipped} <= {"tensorrt", "tensorrt-rtx", "onnxruntime-cuda"}
