"""Trace a `VisualClassifier` to ONNX, and write its manifest into the file."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capt_deploy.errors import ModelError
from capt_deploy.manifest import METADATA_KEY

OPSET = 20
OUTPUTS = ("logits", "probabilities", "embedding")
_LARGEST_BYTES = 2**31 - 2**20  # what a protobuf file can hold, less the metadata


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX file in memory."""

    data: bytes
    opset: int
    nodes: int


def trace(network: nn.Module, height: int, width: int, manifest_json: str) -> OnnxGraph:
    """Export with a dynamic batch and a static image size; input `images`, uint8 NHWC.

    Raises:
        ModelError: the network cannot be traced, or does not fit into one file.
    """
    import onnx

    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if size > _LARGEST_BYTES:
        raise ModelError(f"the visual graph has {size / 2**30:.1f} GiB; up to 2 GiB are supported")
    # Traced with two images: a batch of one would be taken for a constant.
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's deprecations are not the user's
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(OUTPUTS),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as cause:  # the exporter wraps whatever went wrong in types of its own
        raise ModelError(f"the visual tower cannot be traced to ONNX: {cause}") from cause
    if program is None:
        raise ModelError("the exporter returned no graph")
    model = program.model_proto
    _strip(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest_json})
    onnx.checker.check_model(model)
    return OnnxGraph(model.SerializeToString(), OPSET, len(model.graph.node))


def _strip(model: Any) -> None:
    """Drop what the exporter notes for debugging: stack traces name folders of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")  # shapes that every reader infers anew
