"""A backend on ONNX's reference implementation in numpy: the worked example of CONTRIBUTING."""

from pathlib import Path

import numpy as np
from onnx.reference import ReferenceEvaluator

from capt_deploy.backends.base import Outputs, Pixels
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.core.errors import BackendError


class Dummy:
    """A graph that numpy runs."""

    name = "dummy"
    device = "cpu"

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> None:
        try:
            self._graph = ReferenceEvaluator(onnx)
        except Exception as cause:
            raise BackendError(f"backend dummy cannot load the graph: {cause}") from cause

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; see `Backend.run`."""
        values = self._graph.run(list(Outputs._fields), {"images": images})
        return Outputs(*(np.asarray(value, np.float32) for value in values))

    def close(self) -> None:
        """Do nothing: the graph holds no resources."""
