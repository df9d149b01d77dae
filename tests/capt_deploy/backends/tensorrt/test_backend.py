"""What needs a GPU is run only where one is; the rest says what is missing."""

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest

from capt_deploy.backends.base import Backend, DeviceTimed, Outputs
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import TENSORRT, TENSORRT_RTX
from capt_deploy.backends.tensorrt.backend import TensorRT, TensorRTRTX
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import make_logger
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_problem
from tests.capt_deploy.backends.tensorrt.host_device import (
    PIXELS,
    Engine,
    HostDevice,
    answer,
    library,
)

KINDS = (TensorRT, TensorRTRTX)
STAND_INS = "tests.capt_deploy.backends.tensorrt.host_device"


@pytest.fixture(scope="module")
def onnx(golden):
    return (golden / "model.onnx").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_is_named_with_what_installs_it(kind, onnx, monkeypatch):
    module = kind.spec.module
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=rf"{module} is missing; pip install '\.\["):
        kind(onnx, "fp32")


def test_a_library_that_is_too_old_says_which_is_wanted(onnx, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.2.0'")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError, match=r"expected 10\.3 or newer, came 10\.2"):
        TensorRT(onnx, "fp32")
    sys.modules.pop("tensorrt")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here")
@pytest.mark.skipif(gpu_problem() is None, reason="a GPU is here")
def test_without_a_gpu_it_is_unavailable(onnx):
    with pytest.raises(UnavailableError, match=r"driver|GPU"):
        TensorRTRTX(onnx, "fp32")


@pytest.fixture(params=KINDS)
def on_host(request, monkeypatch, tmp_path):
    """Return a function that starts the backend on stand-ins for the GPU and the library."""
    device, cache = HostDevice(), EngineCache(tmp_path)
    kind, spec = request.param, request.param.spec
    version = {TENSORRT: "10.13.0", TENSORRT_RTX: "1.7.1"}[spec]
    monkeypatch.setitem(sys.modules, spec.module, library(spec.module, version, device))
    monkeypatch.setattr("capt_deploy.backends.tensorrt.backend.open_device", lambda ordinal: device)
    make_logger.cache_clear()

    def start(entry=b"an engine", **options):
        options = RuntimeOptions(batches=(1, 4, 8), cache_folder=tmp_path, **options)
        graph = StoredGraph(b"a graph", "fp32")
        cache.write(EngineRequest(graph, spec, device.sm, options.batches, device).key, entry)
        return kind(b"a graph", "fp32", None, options)

    start.device, start.cache, start.spec = device, cache, spec
    yield start
    make_logger.cache_clear()


def small(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *PIXELS), dtype=np.uint8)


@pytest.mark.parametrize("graphs", [True, False])
def test_images_are_split_run_and_joined(on_host, graphs):
    backend = on_host(cuda_graphs=graphs)
    assert isinstance(backend, Backend)
    assert isinstance(backend, DeviceTimed)
    assert backend.device == "cuda:0 (the host)"
    for count in (1, 8, 9, 0, 30):
        asked = small(count, count)
        for own, wanted in zip(backend.run(asked), answer(asked), strict=True):
            assert own.dtype == np.float32
            assert np.array_equal(own, wanted)
    # TensorRT-RTX makes its graphs by itself.
    assert bool(on_host.device.launched) == (graphs and on_host.spec == TENSORRT)
    assert len(backend.time_on_device(small(8), 5)) == 5
    backend.close()
    assert on_host.device.leaks == []


def test_what_is_not_its_input_is_refused(on_host):
    backend = on_host()
    for wrong in (small(2)[:, :2], small(2).astype(np.float32), small(1)[0]):
        with pytest.raises(BackendError, match=r"expected uint8 pixels \(batch, 4, 4, 3\)"):
            backend.run(wrong)
    for count in (0, 9):
        with pytest.raises(BackendError, match="expected 1 to 8 images"):
            backend.time_on_device(small(count), 1)


def test_a_failed_run_is_said_with_the_librarys_own_reason(on_host, monkeypatch):
    def fail(context, stream):
        make_logger(on_host.spec).log(0, "out of\n  registers")
        return False

    backend = on_host()
    monkeypatch.setattr(f"{STAND_INS}.Context.execute_async_v3", fail)
    with pytest.raises(BackendError, match=rf"{backend.name}: .*failed to run; out of registers"):
        backend.run(small(3))  # the probe left graphs of the smallest and the largest batch
    monkeypatch.undo()
    assert on_host.device.leaks == []


def test_old_errors_are_no_reason_of_new_ones(on_host, capsys):
    backend = on_host()
    make_logger(on_host.spec).log(0, "long ago")
    backend.close()
    with pytest.raises(BackendError, match="closed") as caught:
        backend.run(small(1))
    assert "long ago" not in str(caught.value)


def test_loading_leaves_others_their_errors(on_host):
    logger = make_logger(on_host.spec)
    heard = logger.listen()
    logger.log(0, "of a build in another thread")
    on_host()
    assert heard() == ["of a build in another thread"]


def test_of_many_errors_the_last_are_kept(on_host):
    logger = make_logger(on_host.spec)
    heard = logger.listen()
    for number in range(1000):
        logger.log(0, str(number))
        logger.log(4, "of no interest")
    assert heard()[-2:] == ["998", "999"]
    assert len(heard()) < 1000
    assert logger.listen()() == []


def test_closing_is_final_and_may_be_repeated(on_host):
    backend = on_host()
    backend.run(small(3))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(small(1))
    assert on_host.device.leaks == []


def test_what_nobody_closes_is_freed_when_nobody_holds_it(on_host):
    backend = on_host()
    backend.run(small(3))
    assert on_host.device.leaks
    del backend
    gc.collect()
    assert on_host.device.leaks == []


def test_kernels_that_rtx_compiled_are_kept_for_the_next_time(on_host):
    for _ in range(3):
        backend = on_host()
        backend.run(small(1))
        backend.close()
    kept = [entry for entry in on_host.cache.entries() if entry.key["kind"] == "runtime"]
    assert len(kept) == (on_host.spec == TENSORRT_RTX)
    for entry in kept:
        assert entry.key["gpu"] == "the host"
        assert entry.path.read_bytes().endswith(b"kernel " * 3)


def test_kernels_are_kept_at_once_for_a_process_may_be_killed(on_host):
    backend = on_host()
    kept = [entry for entry in on_host.cache.entries() if entry.key["kind"] == "runtime"]
    assert len(kept) == (on_host.spec == TENSORRT_RTX)
    backend.close()


def test_nothing_runs_any_more_when_closing_keeps_the_kernels(on_host, monkeypatch):
    backend, seen = on_host(), []
    monkeypatch.setattr(
        f"{STAND_INS}.RuntimeCache.serialize", lambda kernels: seen.append(on_host.device.leaks)
    )
    backend.close()
    assert seen == ([[]] if on_host.spec == TENSORRT_RTX else [])


@pytest.mark.parametrize("problem", [TypeError("the library's own"), None])
def test_kernels_that_cannot_be_had_keep_nothing_from_closing(on_host, problem, monkeypatch):
    def serialize(kernels):
        if problem is not None:
            raise problem

    monkeypatch.setattr(f"{STAND_INS}.RuntimeCache.serialize", serialize)
    backend = on_host()
    backend.close()
    assert on_host.device.leaks == []
    assert [entry.key["kind"] for entry in on_host.cache.entries()] == ["engine"]


def test_where_cuda_graphs_fail_it_does_without_and_says_why(on_host):
    if on_host.spec == TENSORRT_RTX:
        pytest.skip("it makes its graphs by itself")
    on_host.device.captures = False
    with pytest.warns(UserWarning, match=r"runs without CUDA graphs: .*cudaStreamEndCapture"):
        backend = on_host()
    asked = small(8)
    assert np.array_equal(backend.run(asked).logits, answer(asked).logits)
    backend.close()
    assert on_host.device.leaks == []


def test_graphs_of_rtx_that_fail_are_switched_off(on_host, monkeypatch):
    if on_host.spec == TENSORRT:
        pytest.skip("its graphs are made here")
    create = Engine.create_execution_context

    def create_or_fail(engine, config):
        return None if config.cuda_graph_strategy else create(engine, config)

    monkeypatch.setattr(Engine, "create_execution_context", create_or_fail)
    with pytest.warns(UserWarning, match="runs without CUDA graphs: .*no execution context"):
        assert len(on_host().run(small(3)).logits) == 3


@pytest.mark.filterwarnings("error")  # no word of graphs: they are not what failed
@pytest.mark.parametrize("problem", ["runs", "memory", "numbers"])
def test_what_loads_but_does_not_run_is_an_error_at_once(on_host, problem, monkeypatch):
    if problem == "runs":
        monkeypatch.setattr(f"{STAND_INS}.Context.execute_async_v3", lambda context, stream: False)
    elif problem == "memory":
        on_host.device.left = 100
    else:
        nothing = Outputs(*(values * np.nan for values in answer(small(1))))
        monkeypatch.setattr(f"{STAND_INS}.answer", lambda images: nothing)
    with pytest.raises(BackendError, match=r"failed to run|out of memory|are not finite"):
        on_host()
    assert on_host.device.leaks == []


@pytest.mark.parametrize("entry", [b"refused", b"raises"])
def test_an_engine_that_does_not_load_is_built_again(on_host, entry, monkeypatch):
    built = []

    def build(onnx, spec, **options):
        built.append(options["sm"])
        return b"an engine"

    monkeypatch.setattr("capt_deploy.backends.tensorrt.build.build_engine", build)
    assert len(on_host(entry).run(small(2)).logits) == 2
    assert built == [89 if on_host.spec == TENSORRT_RTX else None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_copy_says_so_and_frees_nothing(on_host):
    backend = on_host()
    backend.run(small(1))
    reader, writer = os.pipe()
    if os.fork() == 0:  # only `_exit` may follow: this is still the test run
        try:
            backend.run(small(1))
        except BackendError as error:
            backend.close()
            os.write(writer, f"{len(on_host.device.leaks) > 0} {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read().startswith("True expected the process")
    os.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_the_librarys_objects_end_in_their_own_process_alone(on_host, monkeypatch):
    ended, kinds = [], ["Context", "Engine"]
    if on_host.spec == TENSORRT_RTX:
        kinds += ["RuntimeCache", "RuntimeConfig"]
    for kind in kinds:
        monkeypatch.setattr(
            f"{STAND_INS}.{kind}.__del__",
            lambda ended_object: ended.append(type(ended_object).__name__),
            raising=False,
        )
    backend = on_host()
    child = os.fork()
    if child == 0:  # only `_exit` may follow: this is still the test run
        del backend
        gc.collect()
        os._exit(len(ended))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del backend
    gc.collect()
    assert sorted(set(ended)) == kinds


@pytest.fixture(scope="module", params=KINDS)
def backend(request, onnx, tmp_path_factory):
    if (problem := request.param.spec.problem()) is not None:
        pytest.skip(problem)
    options = RuntimeOptions(batches=(1, 4, 8), cache_folder=tmp_path_factory.mktemp("engines"))
    try:
        own = request.param(onnx, "fp32", None, options)
    except UnavailableError as cause:
        pytest.skip(str(cause))
    yield own
    own.close()


@pytest.fixture(scope="module")
def reference(onnx):
    return OnnxRuntime(onnx, "fp32")


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def close_to(own, other):
    # float32 summed up in another order
    return all(np.allclose(a, b, atol=1e-3) for a, b in zip(own, other, strict=True))


@pytest.mark.gpu
def test_every_batch_size_says_what_the_cpu_says(backend, reference):
    for count in (1, 3, 8, 20, 2, 8):
        asked = pixels(count, count)
        own = backend.run(asked)
        assert close_to(own, reference.run(asked))
        assert all(values.flags.owndata for values in own)


@pytest.mark.gpu
def test_threads_get_their_own_answers(backend, reference):
    asked = [pixels(1 + seed % 9, seed) for seed in range(100)]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(backend.run, asked))
    assert all(close_to(own, reference.run(one)) for own, one in zip(got, asked, strict=True))


@pytest.mark.gpu
def test_it_is_what_it_says_and_times_itself(backend):
    assert isinstance(backend, Backend)
    assert isinstance(backend, DeviceTimed)
    assert backend.device.startswith("cuda:0 (")
    times = backend.time_on_device(pixels(4), 20)
    assert len(times) == 20
    assert all(time > 0 for time in times)
    with pytest.raises(BackendError, match="expected 1 to 8 images"):
        backend.time_on_device(pixels(9), 1)


@pytest.mark.gpu
def test_other_shapes_and_types_are_refused(backend):
    for wrong in (pixels(2)[:, :8], pixels(2).astype(np.float32), pixels(1)[0]):
        with pytest.raises(BackendError, match="expected uint8 pixels"):
            backend.run(wrong)


@pytest.mark.gpu
def test_the_second_load_builds_nothing_and_closing_is_final(backend, onnx, capsys):
    kind = type(backend)
    options = RuntimeOptions(batches=(1, 4, 8))
    kind(onnx, "fp32", None, options).close()
    capsys.readouterr()
    for graphs in (True, False):
        options = RuntimeOptions(batches=(1, 4, 8), cuda_graphs=graphs)
        again = kind(onnx, "fp32", None, options)
        assert "building" not in capsys.readouterr().err
        assert close_to(again.run(pixels(5)), backend.run(pixels(5)))
        again.close()
        again.close()
        with pytest.raises(BackendError, match="closed"):
            again.run(pixels(1))
