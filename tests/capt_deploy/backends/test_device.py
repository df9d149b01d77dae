import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends import device as device_module
from capt_deploy.backends.device import CudaPython, PyCuda, open_device
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.gpus import gpu_problem
from tests.capt_deploy.backends.cuda_modules import LARGEST, Driver, Runtime

PACKAGES = ("pycuda.driver", "cuda.bindings.runtime", "cuda.cudart")


@pytest.mark.skipif(gpu_problem() is None, reason="a GPU is here")
def test_without_a_gpu_the_reason_is_the_drivers():
    with pytest.raises(UnavailableError) as error:
        open_device()
    assert str(error.value) == gpu_problem()


def test_without_a_package_for_cuda_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(device_module, "gpu_problem", lambda: None)  # as if there were a GPU
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match="found neither; pip install cuda-python"):
        open_device()


@pytest.mark.skipif(gpu_problem() is None, reason="a GPU is here")
def test_errors_of_cuda_are_typed_and_name_the_call():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not here")
    with pytest.raises(BackendError, match="CUDA: cudaGetDeviceCount failed: "):
        CudaPython(runtime, 0)


def test_every_call_of_cuda_python_exists():
    # What cannot be called here without a GPU can at least be looked up.
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not here")
    source = Path(device_module.__file__).read_text()
    names = {word.split('"')[0] for word in source.split('_call("')[1:]}
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(runtime, name)] == []


def test_both_ways_to_cuda_have_the_same_methods():
    methods = [{n for n in dir(kind) if not n.startswith("_")} for kind in (CudaPython, PyCuda)]
    assert methods[0] == methods[1]


def test_importing_it_imports_no_cuda():
    code = "import sys, capt_deploy.backends.device;print([m for m in sys.modules if 'cuda.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_imitation_of_cuda_python_takes_the_same_arguments():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not here")
    names = [name for name in vars(Runtime) if name.startswith("cuda")]
    functions = [name for name in names if callable(getattr(Runtime, name))]
    assert len(functions) > 20
    for name in functions:
        _, *imitated = inspect.signature(getattr(Runtime, name)).parameters
        assert list(inspect.signature(getattr(runtime, name)).parameters) == imitated, name


def test_the_imitation_of_pycuda_has_no_other_names():
    driver = pytest.importorskip(
        "pycuda.driver", reason="pycuda, or NVIDIA's driver, is not here", exc_type=ImportError
    )
    for name in vars(Driver()).keys() - {"host"}:
        assert hasattr(driver, name), name
        for method in {n for n in dir(getattr(Driver(), name)) if not n.startswith("_")}:
            assert hasattr(getattr(driver, name), method) or method == "free", method


IMITATIONS = ((CudaPython, Runtime), (PyCuda, Driver))


@pytest.fixture(params=IMITATIONS, ids=lambda pair: pair[0].__name__)
def imitated(request):
    kind, module = request.param
    own = module()
    return kind(own, 0), own.host


def test_everything_is_given_back(imitated):
    gpu, host = imitated
    there_and_back(gpu)
    if gpu.graphs:
        capture_and_launch(gpu)
    assert host.held == {}
    assert (gpu.name, gpu.sm) == ("an imitation", 89)
    assert gpu.driver.endswith("CUDA 13.0")


def test_what_does_not_fit_is_an_error_of_the_call(imitated):
    gpu, _ = imitated
    with gpu.active(), pytest.raises(BackendError, match=r"CUDA: .*out of memory"):
        gpu.allocate(LARGEST + 1)  # inside: the caller may wait for memory


@pytest.mark.parametrize(("kind", "module"), IMITATIONS)
def test_a_gpu_that_is_not_here_is_an_error(kind, module):
    with pytest.raises(BackendError, match="GPU 1: expected a number from 0 to 0"):
        kind(module(), 1)


def test_pycuda_leaves_no_context_behind():
    own = Driver()
    gpu = PyCuda(own, 0)
    with pytest.raises(ValueError, match="of the caller"), gpu.active(), gpu.active():
        raise ValueError("of the caller")
    assert own.host.contexts.stack == []
    with pytest.raises(BackendError, match="invalid device context"):
        gpu.allocate(1)


@pytest.fixture
def gpu():
    if (problem := gpu_problem()) is not None:
        pytest.skip(problem)
    try:
        return open_device()
    except UnavailableError as cause:
        pytest.skip(str(cause))


@pytest.mark.gpu
def test_a_gpu_says_what_it_is(gpu):
    assert gpu.name
    assert 50 <= gpu.sm < 200
    assert "CUDA " in gpu.driver
    with pytest.raises(BackendError, match="expected a number from 0"):
        open_device(1000)


@pytest.mark.gpu
def test_memory_goes_to_the_gpu_and_back(gpu):
    there_and_back(gpu)


def there_and_back(gpu):
    with gpu.active():
        stream, address, memory = gpu.stream(), gpu.allocate(1000), gpu.pinned(1000)
        wanted = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
        memory[:] = wanted
        gpu.to_device(address, memory, stream)
        first = gpu.record(stream)
        gpu.synchronize(stream)
        memory[:] = 0
        gpu.to_host(memory, address, stream)
        second = gpu.record(stream)
        gpu.synchronize(stream)
        assert np.array_equal(memory, wanted)
        assert gpu.elapsed_ms(first, second) > 0
        for event in (first, second):
            gpu.free_event(event)
        del first, second, event
        gpu.free(address)
        gpu.free_pinned(memory)
        gpu.free_stream(stream)


@pytest.mark.gpu
def test_a_graph_does_again_what_was_captured(gpu):
    if not gpu.graphs:
        pytest.skip("pycuda has no CUDA graphs")
    capture_and_launch(gpu)


def capture_and_launch(gpu):
    with gpu.active():
        stream, address, memory = gpu.stream(), gpu.allocate(4), gpu.pinned(4)
        graph = gpu.capture(lambda: gpu.to_device(address, memory, stream), stream)
        memory[:] = 7
        gpu.launch(graph, stream)
        gpu.synchronize(stream)
        memory[:] = 0
        gpu.to_host(memory, address, stream)
        gpu.synchronize(stream)
        assert memory.tolist() == [7] * 4
        gpu.free_graph(graph)
        gpu.free(address)
        gpu.free_pinned(memory)
        gpu.free_stream(stream)
