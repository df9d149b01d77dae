"""On a real GPU every backend says what the CPU says, in threads, with CUDA graphs and without.

The committed bundle needs no torch; the bundle in all precisions does.
"""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from capt_deploy.backends.base import Backend, DeviceTimed, Outputs
from capt_deploy.backends.device import open_device
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.options import BATCHES, PORTABLE, RuntimeOptions
from capt_deploy.backends.spec import BACKENDS, TENSORRT, BackendSpec
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.core.errors import UnavailableError
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.gate import compare_outputs
from capt_deploy.verify.reference import draw_patterns

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.capt"
ON_GPU = [spec for spec in BACKENDS if spec.needs_gpu]
SIZES = (1, 3, 8, 32, 45)  # within batches, between them, and beyond the largest
Start = Callable[..., Backend]


@pytest.fixture(scope="module", params=ON_GPU, ids=[spec.name for spec in ON_GPU])
def spec(request: pytest.FixtureRequest) -> BackendSpec:
    """Return a backend for GPUs that is installed here."""
    backend: BackendSpec = request.param
    if (reason := backend.problem()) is not None:
        pytest.skip(f"{backend.name}: {reason}")
    return backend


@pytest.fixture(scope="module")
def start(spec: BackendSpec) -> Iterator[Start]:
    """Return a function that starts it on a graph of a bundle; all are closed at the end."""
    started = []

    def begin(bundle: Bundle, precision: str, options: RuntimeOptions | None = None) -> Backend:
        graph = bundle.graph(precision)
        try:
            backend = spec.open(
                graph.onnx, precision, graph.weights_folder, options or RuntimeOptions()
            )
        except UnavailableError as cause:  # TensorRT-RTX on a GPU without RTX, or an old driver
            pytest.skip(str(cause))
        started.append(backend)
        return backend

    yield begin
    for backend in started:
        backend.close()


@pytest.fixture(scope="module")
def golden() -> Bundle:
    return open_bundle(GOLDEN)


@pytest.fixture(scope="module")
def every_precision(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Return a tiny bundle with a graph in each precision."""
    pytest.importorskip("torch")
    from capt_train.pipeline import train
    from export.writer import ExportOptions, export_run
    from tests.configs import train_config

    photos, model = (request.getfixturevalue(name) for name in ("photos", "tiny_model_dir"))
    folder = tmp_path_factory.mktemp("precisions")
    train(train_config(str(photos), f"local-dir:{model}", method="zeroshot"), folder / "run")
    options = ExportOptions(precisions=("fp32", "fp16", "bf16", "int8"))
    return open_bundle(export_run(folder / "run", folder / "all.capt", options=options))


def on_cpu(bundle: Bundle, images: NDArray[np.uint8]) -> Outputs:
    """Return what the float32 graph says on the CPU."""
    graph = bundle.graph("fp32")
    return OnnxRuntime(graph.onnx, "fp32", graph.weights_folder).run(images)


def check(bundle: Bundle, precision: str, found: Outputs, images: NDArray[np.uint8]) -> None:
    labels = np.full(len(images), -1)
    result = compare_outputs(precision, on_cpu(bundle, images), found, labels)
    assert result.passed, result.failures


@pytest.mark.parametrize("images", SIZES)
def test_any_number_of_images_is_answered_as_on_the_cpu(
    start: Start, golden: Bundle, images: int
) -> None:
    pixels = draw_patterns(golden.manifest.preprocess.size, images)
    backend = start(golden, "fp32")
    assert backend.device.startswith("cuda:0 (")
    check(golden, "fp32", backend.run(pixels), pixels)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_lower_precisions_are_within_the_limits_of_the_gate(
    start: Start, every_precision: Bundle, precision: str
) -> None:
    pixels = draw_patterns(every_precision.manifest.preprocess.size, 64)
    check(every_precision, precision, start(every_precision, precision).run(pixels), pixels)


def test_cuda_graphs_and_plain_runs_agree(start: Start, golden: Bundle) -> None:
    with_graphs = start(golden, "fp32", RuntimeOptions(cuda_graphs=True))
    plain = start(golden, "fp32", RuntimeOptions(cuda_graphs=False))
    for images in SIZES:
        pixels = draw_patterns(golden.manifest.preprocess.size, images)
        for _ in range(3):  # captured, then replayed
            for own, wanted in zip(with_graphs.run(pixels), plain.run(pixels), strict=True):
                np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5)


def test_eight_threads_get_their_own_answers(start: Start, golden: Bundle) -> None:
    backend = start(golden, "fp32")
    pixels = draw_patterns(golden.manifest.preprocess.size, 40)
    wanted = backend.run(pixels).logits
    wrong: list[str] = []
    together = threading.Barrier(8)

    def ask(thread: int) -> None:
        together.wait()
        for turn in range(50):
            first = (thread * 5 + turn) % 30
            rows = slice(first, first + 1 + (thread + turn) % 9)
            found = backend.run(pixels[rows]).logits
            if not np.allclose(found, wanted[rows], rtol=0, atol=1e-4):
                wrong.append(f"thread {thread}, turn {turn}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_times_on_the_device_are_positive_and_disturb_nothing(start: Start, golden: Bundle) -> None:
    backend = start(golden, "fp32")
    assert isinstance(backend, DeviceTimed)
    pixels = draw_patterns(golden.manifest.preprocess.size, 32)
    before = backend.run(pixels)
    try:
        times = backend.time_on_device(pixels, 20)
    except UnavailableError as cause:
        pytest.skip(str(cause))
    assert len(times) == 20
    assert all(0 < one < 1000 for one in times)
    for own, wanted in zip(backend.run(pixels), before, strict=True):
        np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("portable", PORTABLE)
def test_a_portable_engine_is_found_and_answers_as_the_cpu(
    golden: Bundle, tmp_path: Path, portable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (reason := TENSORRT.problem()) is not None:
        pytest.skip(reason)
    try:
        device, graph = open_device(), golden.graph("fp32")
        request = EngineRequest(graph, TENSORRT, device.sm, BATCHES, device, portable)
        with device.active():
            request.obtain(EngineCache(tmp_path), lambda data: data)
    except UnavailableError as cause:
        pytest.skip(str(cause))
    pixels = draw_patterns(golden.manifest.preprocess.size, 9)
    options = RuntimeOptions(cache_folder=tmp_path)
    backend = TENSORRT.open(graph.onnx, "fp32", graph.weights_folder, options)
    check(golden, "fp32", backend.run(pixels), pixels)
    backend.close()
    assert "is portable; one for this GPU is faster" in capsys.readouterr().err


def test_auto_takes_a_gpu_and_labels_as_the_cpu_does(spec: BackendSpec) -> None:
    photos = sorted((GOLDEN.parent / "photos").rglob("*.png"))
    with Classifier.load(GOLDEN) as gpu, Classifier.load(GOLDEN, "onnxruntime-cpu") as cpu:
        assert gpu.backend.device.startswith("cuda:"), gpu.skipped
        labels = [[one.label for one in c.predict(photos)] for c in (gpu, cpu)]
    assert labels[0] == labels[1]


def test_bench_has_rows_of_the_device(spec: BackendSpec) -> None:
    from capt_deploy.cli.bench import main

    options = ["--backend", spec.name, "--batch", "1,8", "--seconds", "0.1", "--json"]
    result = CliRunner().invoke(main, [str(GOLDEN), *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert all(row["device"].startswith("cuda:") for row in rows)
    assert all(row["machine"]["gpus"] for row in rows)
    by_scope = {(row["scope"], row["batch"]): row["p50_ms"] for row in rows}
    if ("device", 8) in by_scope:  # needs pycuda or cuda-python
        assert by_scope["device", 8] > 0
