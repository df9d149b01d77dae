"""From a graph to predictions with the API of each TensorRT that Jetsons and servers have."""

import sys

import numpy as np
import pytest

from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import TENSORRT, TENSORRT_RTX
from capt_deploy.backends.tensorrt.backend import TensorRT
from capt_deploy.backends.tensorrt.build import EngineRequest
from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.engine import make_logger
from capt_deploy.bundle.graphs import StoredGraph
from capt_deploy.core.errors import BackendError, UnavailableError
from tests.capt_deploy.backends.tensorrt.host_device import PIXELS, Engine, HostDevice, answer
from tests.capt_deploy.backends.tensorrt.libraries import API, VERSIONS, imitate

BATCHES = (1, 4, 8)
GRAPH = StoredGraph(b"a graph", "fp16")


class Machine:
    """One GPU, one version of TensorRT, one cache."""

    def __init__(self, version, folder, monkeypatch):
        self._patch, self.version = monkeypatch, version
        self.device, self.cache = HostDevice(), EngineCache(folder)
        monkeypatch.setattr(
            "capt_deploy.backends.tensorrt.backend.open_device", lambda _: self.device
        )
        self.use(version)

    def use(self, version):
        self.library = imitate(version, self.device)
        self._patch.setitem(sys.modules, "tensorrt", self.library)
        make_logger.cache_clear()

    def start(self, onnx=b"a graph", **options):
        settings = {"batches": BATCHES, "cache_folder": self.cache.folder, **options}
        return TensorRT(onnx, "fp16", None, RuntimeOptions(**settings))

    def request(self, **changes):
        return EngineRequest(GRAPH, TENSORRT, self.device.sm, BATCHES, self.device, **changes)

    def build(self, portable):
        return self.request(portable=portable).obtain(self.cache, lambda data: data)


@pytest.fixture(params=VERSIONS)
def machine(request, tmp_path, monkeypatch):
    yield Machine(request.param, tmp_path, monkeypatch)
    make_logger.cache_clear()


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, *PIXELS), dtype=np.uint8)


@pytest.mark.parametrize("graphs", [True, False])
def test_an_engine_is_built_kept_loaded_and_run(machine, graphs):
    for _ in range(2):
        backend = machine.start(cuda_graphs=graphs)
        for count in (1, 3, 8, 11):
            for column, expected in zip(
                backend.run(images(count)), answer(images(count)), strict=True
            ):
                assert np.array_equal(column, expected)
        assert len(backend.time_on_device(images(4), 3)) == 3
        backend.close()
    assert machine.device.leaks == []
    (config,) = machine.library.built  # the second start has read it
    assert config._profiles == [BATCHES]
    assert config._off == {machine.library.BuilderFlag.TF32}
    assert config._on == set()


def test_measurements_of_one_build_serve_the_next(machine):
    machine.start().close()
    machine.start(batches=(1, 1, 1)).close()
    assert [config._given for config in machine.library.built] == [b"", b" timing"]


def test_a_graph_that_it_cannot_read_is_named(machine):
    with pytest.raises(
        BackendError, match=r"node the_node \(Strange\): no importer is registered for"
    ):
        machine.start(b"strange")
    assert machine.cache.entries() == []


def test_another_version_builds_its_own(machine):
    machine.start().close()
    other = next(name for name in VERSIONS if name != machine.version)
    machine.use(other)
    machine.start().close()
    assert len(machine.library.built) == 1
    engines = [entry for entry in machine.cache.entries() if entry.key["kind"] == "engine"]
    assert sorted(entry.key["version"] for entry in engines) == sorted(
        (VERSIONS[machine.version], VERSIONS[other])
    )


def test_an_older_version_says_which_is_needed(machine, monkeypatch):
    monkeypatch.setattr(machine.library, "__version__", "10.2.0")
    with pytest.raises(UnavailableError, match=r"expected 10\.3 or newer, came 10\.2\.0"):
        machine.start()


def test_an_engine_for_other_hardware_is_found_on_another_gpu(machine, capsys):
    machine.build("hardware")
    (config,) = machine.library.built
    level = API["values"]["HardwareCompatibilityLevel"][machine.version]["AMPERE_PLUS"]
    assert config.hardware_compatibility_level == level
    machine.device.name, machine.device.sm, machine.device.driver = "another GPU", 120, "newer"
    backend = machine.start()
    assert np.array_equal(backend.run(images(3)).logits, answer(images(3)).logits)
    assert "is portable; one for this GPU is faster" in capsys.readouterr().err
    assert len(machine.library.built) == 1
    backend.close()
    machine.device.sm = 75  # Turing is older than Ampere
    machine.start().close()
    assert len(machine.library.built) == 2


def test_an_engine_of_this_gpu_is_preferred(machine, capsys):
    machine.start().close()
    machine.build("hardware")
    capsys.readouterr()
    machine.start().close()
    assert capsys.readouterr().err == ""


def test_an_engine_for_other_hardware_cannot_be_had_on_a_jetson(machine, monkeypatch):
    machine.build("hardware")
    monkeypatch.setattr("capt_deploy.backends.tensorrt.build.jetson_linux", lambda: "36.4.3")
    with pytest.raises(BackendError, match="no engine for other hardware on a Jetson"):
        machine.build("hardware")
    machine.start().close()
    assert len(machine.library.built) == 2  # the copied one is not tried


def test_an_engine_for_other_hardware_needs_ampere(machine):
    machine.device.sm = 75
    with pytest.raises(BackendError, match=r"need SM 80 \(Ampere\) or later, came SM 75"):
        machine.build("hardware")


def test_an_engine_for_later_versions_is_found_by_them(machine, monkeypatch):
    machine.build("version")
    (config,) = machine.library.built
    assert config._on == {machine.library.BuilderFlag.VERSION_COMPATIBLE}
    key = machine.request(portable="version").key
    assert (key.version, key.gpu, key.driver) == (machine.version.split(".")[0], "the host", "")
    machine.cache.write(key, b"code")  # loads only where its code may be executed
    monkeypatch.setattr(machine.library, "__version__", f"{key.version}.99.1")
    machine.start().close()
    machine.device.name = "another GPU"
    machine.start().close()
    assert len(machine.library.built) == 2


def test_code_of_an_engine_is_executed_only_if_it_was_built_so(machine):
    machine.cache.write(machine.request().key, b"code")
    machine.start().close()
    assert len(machine.library.built) == 1  # anew


def test_engines_of_rtx_are_portable_as_they_are(machine):
    with pytest.raises(BackendError, match="every engine of tensorrt-rtx is portable"):
        EngineRequest(GRAPH, TENSORRT_RTX, 89, BATCHES, portable="hardware")


def test_the_imitations_have_no_name_that_the_version_lacks(machine):
    engine = machine.library.Runtime(make_logger(TENSORRT)).deserialize_cuda_engine(b"an engine")
    assert isinstance(engine, Engine)
    assert hasattr(engine, "create_runtime_config") == (machine.version != "10.3")
    with pytest.raises(AttributeError, match="ICudaEngine has no streaming"):
        engine.streaming = 1
    assert not hasattr(machine.library, "ComputeCapability")
