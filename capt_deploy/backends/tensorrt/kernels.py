"""What TensorRT-RTX compiles where an engine is loaded, kept beside the engine."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from capt_deploy.backends.tensorrt.cache import EngineCache
from capt_deploy.backends.tensorrt.device import Device
from capt_deploy.backends.tensorrt.entry import EngineKey
from capt_deploy.core.process import Process, never_free_in_copies


class Kernels:
    """The kernels of an engine for one GPU, and execution contexts that compile and use them."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        device: Device,
        cache: EngineCache,
        key: EngineKey,
        graphs: bool,
    ) -> None:
        self._engine, self._device, self._cache, self._process = engine, device, cache, Process()
        self._key = replace(key, kind="runtime", gpu=device.name, driver=device.driver)
        with device.active():
            self._config = engine.create_runtime_config()
            self._kernels = self._config.create_runtime_cache()
            for value in (self._config, self._kernels):
                never_free_in_copies(value)
            self._saved = cache.read(self._key)
            if self._saved is not None:
                self._kernels.deserialize(self._saved)  # does nothing if the machine is another one
            self._config.set_runtime_cache(self._kernels)
        # It makes CUDA graphs by itself, for it replaces kernels by better ones while it runs.
        if graphs and hasattr(self._config, "cuda_graph_strategy"):  # from 1.2 on
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    def context(self, scratch: int) -> Any:
        """Return an execution context, which has memory of its own."""
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        """Keep them for the next time, where that is possible; nothing may run meanwhile."""
        if not self._process.is_this:
            return
        with suppress(Exception), self._device.active():  # without them the next load is slower
            kernels = self._kernels.serialize()  # None where the library cannot say
            if kernels is not None and (data := bytes(kernels)) and data != self._saved:
                self._cache.write(self._key, data)
                self._saved = data
