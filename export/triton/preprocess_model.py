"""The preprocessing model of a Triton repository, for Triton's Python backend.

Encoded images in, pixels of the graph out: `capt_deploy.data.preprocess` and nothing else, so that
the server sees the very pixels that the model was tuned and checked on. capt must be installed in
the server's Python environment: `pip install capt-VERSION-py3-none-any.whl`,
which `make wheel` builds.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own

from capt_deploy.core.errors import ImageError
from capt_deploy.data.preprocess import PreprocessConfig, preprocess


class TritonPythonModel:
    """The class that Triton looks for by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how to preprocess from `parameters` of config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = json.loads(parameters["preprocess"]["string_value"])
        self.config = PreprocessConfig.from_dict(values)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself: a broken image fails its own request alone."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        # (batch, 1) of bytes, each an encoded file
        encoded = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        pixels = []
        for number, image in enumerate(encoded, 1):
            try:
                pixels.append(preprocess(bytes(image), self.config))
            except ImageError as error:
                message = f"image {number} of {len(encoded)}: {error}"
                failure = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                return pb_utils.InferenceResponse(output_tensors=[], error=failure)
        tensor = pb_utils.Tensor("images", np.stack(pixels))
        return pb_utils.InferenceResponse(output_tensors=[tensor])
