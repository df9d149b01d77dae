"""Make the graph of one precision."""

from dataclasses import dataclass
from typing import Any

import torch

from capt_deploy.console import say
from export.onnx_graph import BF16_OPSET, OnnxGraph, trace
from export.precision import BF16, DTYPES, FP32
from export.source import Source
from export.visual import VisualClassifier

_FUSED_OPSET = 23  # from here on ONNX has an Attention operator


@dataclass(frozen=True)
class Traced:
    """A graph, and what is to be said of how it was made."""

    graph: OnnxGraph
    normalisation: str
    emulated: bool  # whether the CPU can only emulate it

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "opset": self.graph.opset,
            "nodes": self.graph.nodes,
            "operators": self.graph.operators,
            "weight_bytes": self.graph.weight_bytes,
            "normalisation": self.normalisation,
            "asked": "emulated in float32, rounded" if self.emulated else "ONNX Runtime on the CPU",
        }


def trace_precision(source: Source, precision: str, opset: int) -> Traced:
    """Return the graph of one precision, calibrated as float32 is.

    Raises:
        ModelError: the visual side cannot be traced.
    """
    say(f"tracing the {precision} graph")
    backbone = source.learner.backbone
    if precision == BF16:
        opset = max(opset, BF16_OPSET)
    # TensorRT has no float32 kernel for the operator.
    fused = opset >= _FUSED_OPSET and precision != FP32
    network = VisualClassifier(
        backbone, source.head, source.learner.visual, fused_attention=fused
    ).eval()
    with torch.no_grad():
        network.lower(DTYPES[precision])
    graph = trace(network, *backbone.preprocess.size, precision, opset)
    explicit = "explicit" if network.normalises else "folded into the patch convolution"
    return Traced(graph, explicit, precision == BF16)
