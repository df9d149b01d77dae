"""Trace networks to ONNX, and write the graphs with their weights and metadata."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.graphs import HASHED_KEY, with_hash
from capt_deploy.bundle.manifest import METADATA_KEY, PRECISION_KEY, Graph
from capt_deploy.core.errors import ModelError
from capt_deploy.core.files import naming, write_bytes
from export.source.fold import FoldedHead

OPSET = 20
BF16_OPSET = 22  # the first with a convolution of bfloat16
OPSETS = (20, 21, 22, 23)
OUTPUTS = Outputs._fields
_LARGEST_BYTES = 2**31 - 2**24  # of weights in one protobuf file, with room for the metadata


@dataclass(frozen=True)
class OnnxGraph:
    """A traced network in memory."""

    model: Any  # onnx_ir.Model
    opset: int
    precision: str

    @property
    def nodes(self) -> int:
        """Return the number of operators."""
        return len(self.model.graph)

    @property
    def operators(self) -> dict[str, int]:
        """Return the number of operators by type, most frequent first."""
        counts = Counter(node.op_type for node in self.model.graph)
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def weight_bytes(self) -> int:
        """Return the size of all constants."""
        return sum(value.const_value.nbytes for value in self.model.graph.initializers.values())

    @property
    def external(self) -> bool:
        """Return whether the weights need a second file."""
        return self.weight_bytes > _LARGEST_BYTES

    def set_head(self, head: FoldedHead) -> None:
        """Replace the head, for another temperature."""
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

    def to_bytes(self, manifest_json: str = "") -> bytes:
        """Return the ONNX file, with its manifest, precision and hash as metadata."""
        import onnx_ir

        self._set_metadata(manifest_json)
        return with_hash(onnx_ir.to_proto(self.model).SerializeToString())

    def write(self, path: Path, manifest_json: str = "") -> None:
        """Write the ONNX file, and the weights of an `external` graph to `PATH.data`."""
        if not self.external:
            write_bytes(path, self.to_bytes(manifest_json))
            return
        import onnx_ir

        self._set_metadata(manifest_json)
        with naming(path):
            onnx_ir.save(self.model, path, external_data=external_name(path.name))
        write_bytes(path, with_hash(path.read_bytes()))

    def record(self, file: str) -> Graph:
        """Return the graph's entry in a manifest, for a file of that name."""
        return Graph(file, self.opset, weights=external_name(file) if self.external else None)

    def _set_metadata(self, manifest_json: str) -> None:
        self.model.metadata_props.clear()
        metadata = {METADATA_KEY: manifest_json, PRECISION_KEY: self.precision}
        self.model.metadata_props.update(metadata | {HASHED_KEY: "at the end"})


def external_name(file: str) -> str:
    """Return the name of the file for the weights of an `external` graph."""
    return f"{file}.data"


def trace(
    network: nn.Module, height: int, width: int, precision: str = "fp32", opset: int = OPSET
) -> OnnxGraph:
    """Trace a visual network with a dynamic batch of images of one size, uint8 NHWC.

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
    subject: str,
) -> Any:
    """Return a network with one input as an `onnx_ir.Model`.

    Args:
        network: the network to trace.
        input_: name of the input, an example, and the `torch.export.Dim`s of its dynamic axes.
        outputs: names of the outputs.
        opset: version of the operators.
        subject: name of the network in error messages.

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
    except Exception as cause:  # the exporter's own types of errors, for all causes
        raise ModelError(f"{subject} cannot be traced to ONNX: {cause}") from cause
    if program is None:
        raise ModelError(f"{subject} cannot be traced to ONNX: the exporter returned no graph")
    _strip(program.model)
    _rename_duplicates(program.model)
    return program.model


def _strip(model: Any) -> None:
    """Remove the exporter's notes for debugging: stack traces name folders of this machine."""
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


def _rename_duplicates(model: Any) -> None:
    """Rename inner values that have the name of an output.

    The exporter names outputs last, and an operator's value may have that name already, such as
    `embedding`.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if outputs.get(value.name, value) is not value:
                value.name = f"{value.name}.inner"
