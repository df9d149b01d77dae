"""Imitations of TensorRT 10.3, 10.13 and 11: the names of the real ones, and no others.

`api.json` lists the public names of the classes that the runtime uses, and the numbers of their
flags, as read from the Python bindings of TensorRT 10.3.0, 10.13.3.9 and 11.4.0.106. Any other name
raises an AttributeError, as in the real classes. Engines compute what host_device.py says.
"""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.capt_deploy.backends.tensorrt.host_device import INPUT, PIXELS, Context, Engine

API = json.loads(Path(__file__).with_name("api.json").read_text())
VERSIONS = {"10.3": "10.3.0", "10.13": "10.13.3.9", "11": "11.4.0.106"}


def documented(kind, version):
    """Return the public names of a class in a version."""
    groups = API["names"][kind].items()
    return {
        name for versions, names in groups if version in versions.split() for name in names.split()
    }


def limited(imitation, kind, version):
    """Return a class of what `imitation` does, under the names of the class `kind` alone."""
    names = documented(kind, version)

    def check(name):
        if not name.startswith("_") and name not in names:
            raise AttributeError(f"tensorrt {version}: {kind} has no {name}")

    class Limited(imitation):
        def __getattribute__(self, name):
            check(name)
            return super().__getattribute__(name)

        def __setattr__(self, name, value):
            check(name)
            super().__setattr__(name, value)

    return Limited


class Network:
    num_inputs = 1

    def __init__(self, tensor):
        self._input = tensor

    def get_input(self, index):
        assert index == 0
        return self._input


class Tensor:
    name, shape = INPUT, (-1, *PIXELS)


class Profile:
    def set_shape(self, input, min, opt, max):
        assert (input, min[1:], opt[1:], max[1:]) == (INPUT, PIXELS, PIXELS, PIXELS)
        self._batches = (min[0], opt[0], max[0])


class TimingCache:
    def __init__(self, data):
        self._data = data

    def serialize(self):
        return memoryview(self._data + b" timing")


class ParserError:
    def desc(self):
        return "no importer is registered\nfor it"

    def node(self):
        return 3

    def node_name(self):
        return "the_node"

    def node_operator(self):
        return "Strange"


def imitate(version, device):
    """Return a module with the names of that version; `built` has the settings of each build."""
    module = ModuleType("tensorrt")
    module.__version__, module.built = VERSIONS[version], []
    flags = {kind: SimpleNamespace(**API["values"][kind][version]) for kind in API["values"]}
    make = {
        kind: limited(imitation, kind, version)
        for kind, imitation in (
            ("INetworkDefinition", Network),
            ("ITensor", Tensor),
            ("IOptimizationProfile", Profile),
            ("ITimingCache", TimingCache),
            ("ParserError", ParserError),
            ("IExecutionContext", Context),
        )
    }

    class OwnEngine(Engine):
        def create_execution_context(self, strategy):
            assert strategy == flags["ExecutionContextAllocationStrategy"].USER_MANAGED
            return make["IExecutionContext"](self._device)

    make["ICudaEngine"] = limited(OwnEngine, "ICudaEngine", version)

    class Config:
        progress_monitor = hardware_compatibility_level = None

        def __init__(self):
            self._off, self._on, self._profiles, self._timings = set(), set(), [], None

        def clear_flag(self, flag):
            self._off.add(flag)

        def set_flag(self, flag):
            self._on.add(flag)

        def add_optimization_profile(self, profile):
            self._profiles.append(profile._batches)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            self._given = bytes(serialized_timing_cache)
            return make["ITimingCache"](self._given)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch is False
            self._timings = cache
            return True

    class Builder:
        def __init__(self, logger):
            assert isinstance(logger, module.ILogger)

        def create_network(self, flags=0):
            assert flags == 1 << flags_of.STRONGLY_TYPED
            return make["INetworkDefinition"](make["ITensor"]())

        def create_builder_config(self):
            return config()

        def create_optimization_profile(self):
            return make["IOptimizationProfile"]()

        def build_serialized_network(self, network, config):
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            assert all(monitor.step_complete("Building", step) for step in range(2))
            monitor.phase_finish("Building")
            module.built.append(config)
            return memoryview(b"an engine")

    class OnnxParser:
        def __init__(self, network, logger):
            self._failed = False

        def parse(self, model, path=None):
            self._failed = bytes(model) == b"strange"
            return not self._failed

        @property
        def num_errors(self):
            return int(self._failed)

        def get_error(self, index):
            return make["ParserError"]()

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            assert isinstance(logger, module.ILogger)

        def deserialize_cuda_engine(self, serialized_engine):
            known = {b"an engine", b"code"} if self.engine_host_code_allowed else {b"an engine"}
            return make["ICudaEngine"](device) if serialized_engine in known else None

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    class IProgressMonitor:
        pass

    flags_of = flags["NetworkDefinitionCreationFlag"]
    config = limited(Config, "IBuilderConfig", version)
    kinds = (Builder, OnnxParser, Runtime)
    vars(module).update({kind.__name__: limited(kind, kind.__name__, version) for kind in kinds})
    vars(module).update(flags, ILogger=ILogger, IProgressMonitor=IProgressMonitor)
    return module
