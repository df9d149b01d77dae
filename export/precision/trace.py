"""Make the graph of one precision."""

from collections.abc import Sequence
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
from export.graph.lower import BF16, DTYPES, FP32, INT8
from export.graph.onnx_graph import BF16_OPSET, OnnxGraph, trace
from export.graph.visual import VisualClassifier
from export.precision.quantize import Quantisation, quantize
from export.source.model import Source, spread

_FUSED_OPSET = 23  # from here on ONNX has an Attention operator
_CALIBRATED_ON = 128  # images, at most
_AT_ONCE = 16
_EMULATED = "emulated in float32, rounded"  # all that a CPU can do with bfloat16


@dataclass(frozen=True)
class Traced:
    """A graph, and what is to be said of how it was made."""

    graph: OnnxGraph
    normalisation: str
    quantisation: Quantisation | None  # of int8

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        quantised = {} if self.quantisation is None else {"int8": self.quantisation.to_dict()}
        return {
            "opset": self.graph.opset,
            "nodes": self.graph.nodes,
            "operators": self.graph.operators,
            "weight_bytes": self.graph.weight_bytes,
            "normalisation": self.normalisation,
            "asked": _EMULATED if self.graph.precision == BF16 else "ONNX Runtime on the CPU",
            **quantised,
        }


def trace_precision(source: Source, precision: str, opset: int, expected: Outputs) -> Traced:
    """Return the graph of one precision, calibrated as float32 is.

    Before it is lowered, the network has to say of the patterns what the trained model says: what
    rounding costs would hide a wrong mean or weight.

    Args:
        source: what is exported.
        precision: one of `PRECISIONS`.
        opset: of the graph, at least.
        expected: the trained model's answers to `patterns`.

    Raises:
        ModelError: the visual side cannot be traced, or not be quantised.
        GateError: the float32 network does not say what the trained model says.
        DataError: int8 finds none of the run's training images.
    """
    say(f"tracing the {precision} graph")
    backbone = source.learner.backbone
    if precision == BF16:
        opset = max(opset, BF16_OPSET)
    # TensorRT has no float32 kernel for the operator.
    fused = opset >= _FUSED_OPSET and precision != FP32
    network = VisualClassifier(
        *(backbone, source.head, source.learner.visual),
        calibration=source.calibration,
        fused_attention=fused,
    ).eval()
    quantisation, factors = None, network.factors
    with torch.no_grad():
        _compare_network(network, backbone.preprocess.size, expected)
        if precision == INT8:
            # What rounding does to logits must not jump with the class whose factor they get.
            network.factors = None
            quantisation = quantize(network, _training_pixels(source))
            network.factors = factors
            say(f"int8: {100 * quantisation.work:.0f} % of the products")
        network.lower(DTYPES[precision])
    graph = trace(network, *backbone.preprocess.size, precision, opset)
    explicit = "explicit" if network.normalises else "folded into the patch convolution"
    return Traced(graph, explicit, quantisation)


def _compare_network(network: VisualClassifier, size: tuple[int, int], expected: Outputs) -> None:
    drawn = torch.from_numpy(draw_patterns(size))
    found = zip(*(network(part[None])[:2] for part in drawn), strict=True)
    limit = LIMITS[FP32].max_logit_difference
    for what, own, wanted in zip(
        ("logit", "probability"),
        map(torch.cat, found),
        (expected.logits, expected.probabilities),
        strict=True,
    ):
        difference = float((own - torch.from_numpy(wanted)).abs().max())
        if not difference <= limit:
            raise GateError(
                f"the network to be exported differs from the trained model before its precision "
                f"is lowered: max |Δ{what}| {difference:.2g}, limit {limit:.0e}"
            )


def _training_pixels(source: Source) -> Sequence[UInt8[Tensor, "_ height width 3"]]:
    """Return images of the kind that the graph will see, and not those that it is judged by."""
    files = [str(photo.path) for photo in spread(source.training_images, _CALIBRATED_ON)]
    preprocess = source.learner.backbone.preprocess
    batches = preprocess_files(files, preprocess, _AT_ONCE)
    pixels = [torch.from_numpy(batch.pixels) for batch in batches if batch.pixels is not None]
    if not pixels:
        raise DataError(
            f"int8 is calibrated on the run's training images, but none of {len(files)} can be "
            f"read (first: {files[0] if files else 'none'}); restore them, or leave --int8 out"
        )
    return pixels
