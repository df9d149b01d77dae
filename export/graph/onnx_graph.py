"""Trace a network to ONNX; change head and metadata of the graph; write it, with its weights."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capt_deploy.bundle.manifest import METADATA_KEY, PRECISION_KEY, Graph
from capt_deploy.core.errors import ModelError
from capt_deploy.core.files import write_bytes
from export.source.fold import Head

OPSET = 20
BF16_OPSET = 22  # the first with a convolution of bfloat16
OPSETS = (20, 21, 22, 23)
OUTPUTS = ("logits", "probabilities", "embedding")
_LARGEST_BYTES = 2**31 - 2**24  # what one protobuf file can hold, less the metadata


@dataclass(frozen=True)
class OnnxGraph:
    """A traced network that is not on disk yet."""

    model: Any  # onnx_ir.Model
    opset: int
    precision: str

    @property
    def nodes(self) -> int:
        """How many operators there are."""
        return len(self.model.graph)

    @property
    def operators(self) -> dict[str, int]:
        """How many there are of each kind, most first."""
        counts: dict[str, int] = {}
        for node in self.model.graph:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def weight_bytes(self) -> int:
        """How large its constants are."""
        return sum(value.const_value.nbytes for value in self.model.graph.initializers.values())

    def set_head(self, head: Head) -> None:
        """Put another head in, for another temperature."""
        import onnx_ir

        rows = self.model.graph.initializers["weight"]
        ((convolution, _),) = rows.uses()
        # The exporter lets equal constants share one initializer, and drops a bias of zeros, which
        # no temperature changes.
        for place, tensor in enumerate((head.weight, head.bias), start=1):
            if place == len(convolution.inputs):
                continue
            old = convolution.inputs[place]
            name = f"head.{'weight' if place == 1 else 'bias'}"
            array = tensor.float().numpy().reshape(tuple(old.shape))
            value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
            value.shape, value.type = old.shape, old.type
            self.model.graph.initializers[name] = value
            convolution.replace_input_with(place, value)
            if not old.uses():
                del self.model.graph.initializers[old.name]

    @property
    def external(self) -> bool:
        """Whether its weights need a second file."""
        return self.weight_bytes > _LARGEST_BYTES

    def to_bytes(self, manifest_json: str = "") -> bytes:
        """Return the ONNX file, with what it says about itself."""
        import onnx_ir

        self._describe(manifest_json)
        return onnx_ir.to_proto(self.model).SerializeToString()  # type: ignore[no-any-return]

    def write(self, path: Path, manifest_json: str = "") -> None:
        """Write the ONNX file, and where it is `external` its weights to `PATH.data`."""
        if not self.external:
            write_bytes(path, self.to_bytes(manifest_json))
            return
        import onnx_ir

        self._describe(manifest_json)
        onnx_ir.save(self.model, path, external_data=external_name(path.name))

    def record(self, file: str) -> Graph:
        """Return what a manifest says of it, written under that name."""
        return Graph(file, self.opset, weights=external_name(file) if self.external else None)

    def _describe(self, manifest_json: str) -> None:
        own = {METADATA_KEY: manifest_json, PRECISION_KEY: self.precision}
        self.model.metadata_props.clear()
        self.model.metadata_props.update(own)


def external_name(file: str) -> str:
    """Return the name of the second file of a graph that has one."""
    return f"{file}.data"


def trace(
    network: nn.Module, height: int, width: int, precision: str = "fp32", opset: int = OPSET
) -> OnnxGraph:
    """Export with a dynamic batch and a static image size; input `images`, uint8 NHWC.

    Raises:
        ModelError: the network cannot be traced.
    """
    # Traced with two images: a batch of one would be taken for a constant.
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch")}
    model = to_onnx(network, ("images", example, batch), OUTPUTS, opset, "the visual tower")
    return OnnxGraph(model, opset, precision)


def to_onnx(
    network: nn.Module,
    input_: tuple[str, Tensor, Mapping[int, Any]],
    outputs: Sequence[str],
    opset: int,
    what: str,
) -> Any:
    """Return a network with one input as an `onnx_ir.Model`.

    Args:
        network: to be traced.
        input_: its name, an example, and the `torch.export.Dim`s of the axes that may vary.
        outputs: their names.
        opset: of the operators.
        what: is traced, for an error.

    Raises:
        ModelError: the network cannot be traced.
    """
    name, example, axes = input_
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's deprecations are not the user's
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[name],
                output_names=list(outputs),
                dynamic_shapes={name: dict(axes)},
                verbose=False,
            )
    except Exception as cause:  # the exporter wraps whatever went wrong in types of its own
        raise ModelError(f"{what} cannot be traced to ONNX: {cause}") from cause
    if program is None:
        raise ModelError("the exporter returned no graph")
    _strip(program.model)
    _rename_doubles(program.model)
    return program.model


def _strip(model: Any) -> None:
    """Drop what the exporter notes for debugging: stack traces name folders of this machine."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
        node.doc_string = None
        node.metadata_props.clear()
    for part in (model, graph, *values):
        part.doc_string = None
        part.metadata_props.clear()
    for function in [*model.functions]:
        del model.functions[function]


def _rename_doubles(model: Any) -> None:
    """Give a name of their own to values which the exporter named after an operator.

    Outputs get their names last, and one may be an operator's, such as `embedding`.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if outputs.get(value.name, value) is not value:
                value.name = f"{value.name}.inner"
