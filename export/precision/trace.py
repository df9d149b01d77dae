"""Trace the graph of one precision."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from capt_deploy.backends.base import Outputs
from capt_deploy.core.console import say
from capt_deploy.core.errors import DataError, GateError
from capt_deploy.data.batches import preprocess_files
from capt_deploy.verify.gate import LIMITS
from capt_deploy.verify.reference import draw_patterns
from export.graph.lower import BF16, DTYPES, FP32, INT8, INT8_CPU
from export.graph.onnx_graph import BF16_OPSET, OnnxGraph, trace
from export.graph.visual import VisualClassifier
from export.precision.int8_layers import use_unsigned_inputs
from export.precision.quantize import Quantisation, quantize
from export.precision.sensitivity import written_out
from export.source.model import Source
from export.source.photos import spread_evenly

_FUSED_OPSET = 23  # the first with an Attention operator
_CALIBRATION_IMAGES = 128  # at most
_BATCH = 16


@dataclass(frozen=True)
class TracedGraph:
    """A graph, and how it was made."""

    graph: OnnxGraph
    normalisation: str
    quantisation: Quantisation | None  # of int8

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        emulated = self.graph.precision == BF16  # the CPU has no kernels
        quantised = {} if self.quantisation is None else {"int8": self.quantisation.to_dict()}
        return {
            "opset": self.graph.opset,
            "nodes": self.graph.nodes,
            "operators": self.graph.operators,
            "weight_bytes": self.graph.weight_bytes,
            "normalisation": self.normalisation,
            "asked": "emulated in float32, rounded" if emulated else "ONNX Runtime on the CPU",
            **quantised,
        }


def trace_precision(
    source: Source, precision: str, opset: int, expected: Outputs
) -> tuple[TracedGraph, ...]:
    """Return the graph of one precision, with the temperature of float32.

    For int8 a second one follows, for CPUs: what is not int8 in it is float32.

    Before its precision is lowered, the network must give the trained model's outputs for the
    patterns: rounding errors would hide a wrong mean or weight.

    Args:
        source: the model to export.
        precision: one of `PRECISIONS`.
        opset: of the graph, at least.
        expected: the trained model's outputs for the patterns.

    Raises:
        ModelError: the visual side cannot be traced or quantised.
        GateError: the float32 network differs from the trained model.
        DataError: int8 finds none of the run's training images.
    """
    say(f"tracing the {precision} graph")
    graphs: list[TracedGraph] = []
    backbone = source.learner.backbone
    if precision == BF16:
        opset = max(opset, BF16_OPSET)
    network = VisualClassifier(
        *(backbone, source.head, source.learner.visual),
        calibration=source.calibration,
        # TensorRT has no float32 kernel for the operator.
        fused_attention=opset >= _FUSED_OPSET and precision != FP32,
    ).eval()
    quantisation, factors = None, network.factors

    def add(network: VisualClassifier, precision: str) -> None:
        graph = trace(network, *backbone.preprocess.size, precision, opset)
        explicit = "explicit" if network.normalises else "folded into the patch convolution"
        graphs.append(TracedGraph(graph, explicit, quantisation))

    with torch.no_grad():
        _compare_network(network, backbone.preprocess.size, expected)
        if precision == INT8:
            # Logits must not jump with the factor of the most probable class when it changes.
            network.factors = None
            quantisation = quantize(network, calibration_pixels(source))
            network.factors = factors
            say(f"int8: {100 * quantisation.work:.0f} % of the multiply-adds")
            float32 = copy.deepcopy(network)  # a graph holds the network's own tensors
            with use_unsigned_inputs(float32), written_out(float32):
                add(float32, INT8_CPU)
        network.lower(DTYPES[precision])
    add(network, precision)
    return tuple(reversed(graphs))


def _compare_network(network: VisualClassifier, size: tuple[int, int], expected: Outputs) -> None:
    outputs = [network(pattern[None]) for pattern in torch.from_numpy(draw_patterns(size))]
    limit = LIMITS[FP32].max_logit_difference
    for place, name in enumerate(("logits", "probabilities")):
        values = torch.cat([output[place] for output in outputs])
        difference = float((values - torch.from_numpy(expected[place])).abs().max())
        if not difference <= limit:  # NaN fails too
            raise GateError(
                f"the float32 network differs from the trained model: expected {name} to differ "
                f"by at most {limit:.0e}, came {difference:.2g}"
            )


def calibration_pixels(source: Source) -> UInt8[Tensor, "images height width 3"]:
    """Return training images, preprocessed; the gate judges the graph by other images."""
    photos = spread_evenly(source.photos.training, _CALIBRATION_IMAGES)
    files = [str(photo.path) for photo in photos]
    batches = preprocess_files(files, source.learner.backbone.preprocess, _BATCH)
    pixels = [torch.from_numpy(batch.pixels) for batch in batches if batch.pixels is not None]
    if not pixels:
        raise DataError(
            f"int8 is calibrated on the run's training images, but none of {len(files)} can be "
            f"read (first: {files[0] if files else 'none'}); restore them, or leave --int8 out"
        )
    return torch.cat(pixels)
