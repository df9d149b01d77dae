"""Configurations of the models of a Triton repository, in protobuf's text format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capt_deploy.bundle.read import Bundle
from capt_deploy.data.preprocess import PreprocessConfig
from export.graph.lower import FP32, INT8_CPU

LABELS = "labels.txt"
_QUEUE_DELAY_US = 1000  # how long a request may wait for others to share a batch with
_PREPROCESS_INSTANCES = 2  # each in a process of its own
_ENUMERATIONS = ("data_type", "kind")  # fields whose values have no quotes
_PRINTABLE = frozenset(range(32, 127)) - set(b'"\\')


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model; `dims` leaves out the batch."""

    name: str
    data_type: str  # Triton's name of it
    dims: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of Triton's `ModelInput`."""
        return {"name": self.name, "data_type": self.data_type, "dims": self.dims}


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a bundle's graphs."""

    images: TensorSpec
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "Signature":
        """Return the signature that all graphs of a bundle share."""
        classes, dim = bundle.text_embeddings()["text_embeddings"].shape
        widths = {"logits": classes, "probabilities": classes, "embedding": dim}
        return cls(
            TensorSpec("images", "TYPE_UINT8", (*bundle.manifest.preprocess.size, 3)),
            tuple(TensorSpec(name, "TYPE_FP32", (width,)) for name, width in widths.items()),
        )

    def shape(self, batch: int) -> str:
        """Return the shape of a batch in TensorRT's notation: `images:8x224x224x3`."""
        return f"{self.images.name}:{'x'.join(map(str, (batch, *self.images.dims)))}"


ENCODED = TensorSpec("image", "TYPE_STRING", (1,))  # one encoded file for each image of the batch


def onnx_config(
    name: str, signature: Signature, batches: tuple[int, int, int], precision: str
) -> dict[str, Any]:
    """Return the model that ONNX Runtime runs, on GPUs where there are some, else on the CPU."""
    config = _graph_config(name, signature, batches, "onnxruntime_onnx", "KIND_AUTO")
    if precision not in (FP32, INT8_CPU):
        # Triton's name for "basic"; see capt_deploy/backends/onnxruntime.py.
        config["optimization"] = {"graph": {"level": -1}}
    return config


def tensorrt_config(
    name: str, signature: Signature, batches: tuple[int, int, int], cache: str
) -> dict[str, Any]:
    """Return the model that ONNX Runtime hands to TensorRT, which builds its engine on loading.

    No `precision_mode` is given: only then TensorRT keeps to the types of the ONNX file.

    Args:
        name: of the model.
        signature: of its graph.
        batches: smallest, usual and largest batch.
        cache: folder for the engine. ONNX Runtime tells graphs apart by their structure, not by
            their weights, so it has to be another folder for every graph.
    """
    profile = {
        f"trt_profile_{which}_shapes": signature.shape(size)
        for which, size in zip(("min", "opt", "max"), batches, strict=True)
    }
    parameters = {**profile, "trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
    accelerator = {"name": "tensorrt", "parameters": _entries(parameters)}
    config = _graph_config(name, signature, batches, "onnxruntime_onnx", "KIND_GPU")
    config["optimization"] = {
        "execution_accelerators": {"gpu_execution_accelerator": [accelerator]}
    }
    return config


def plan_config(name: str, signature: Signature, batches: tuple[int, int, int]) -> dict[str, Any]:
    """Return the model that TensorRT runs from a plan that the user has built."""
    return _graph_config(name, signature, batches, "tensorrt_plan", "KIND_GPU")


def preprocess_config(
    name: str, signature: Signature, largest: int, preprocess: PreprocessConfig
) -> dict[str, Any]:
    """Return the Python model that decodes and preprocesses images."""
    parameters = {"preprocess": {"string_value": json.dumps(preprocess.to_dict())}}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": largest,
        "input": [ENCODED.fields],
        "output": [signature.images.fields],
        "instance_group": [{"kind": "KIND_CPU", "count": _PREPROCESS_INSTANCES}],
        "parameters": _entries(parameters),
    }


def ensemble_config(
    name: str, preprocess_model: str, graph_model: str, signature: Signature, largest: int
) -> dict[str, Any]:
    """Return the model that clients call: preprocessing, then one of the graphs."""
    images, outputs = signature.images.name, [tensor.name for tensor in signature.outputs]
    steps = (
        (preprocess_model, [ENCODED.name], [images]),
        (graph_model, [images], outputs),
    )
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": largest,
        "input": [ENCODED.fields],
        "output": _labelled(signature.outputs),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,  # the latest
                    "input_map": _entries(dict(zip(step_inputs, step_inputs, strict=True))),
                    "output_map": _entries(dict(zip(step_outputs, step_outputs, strict=True))),
                }
                for model, step_inputs, step_outputs in steps
            ]
        },
    }


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Print a message, given as a dictionary of its fields, in protobuf's text format.

    Values are numbers, booleans, strings, dictionaries (messages), or lists of these (repeated
    fields; an empty one prints nothing).
    """
    lines = []
    for field, value in message.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{field} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
                continue
            text = str(item).lower() if isinstance(item, bool) else str(item)
            if isinstance(item, str) and field not in _ENUMERATIONS:
                # Bytes outside ASCII as octal numbers, which every reader understands.
                parts = (chr(b) if b in _PRINTABLE else f"\\{b:03o}" for b in item.encode())
                text = f'"{"".join(parts)}"'
            lines.append(f"{indent}{field}: {text}\n")
    return "".join(lines)


def _graph_config(
    name: str, signature: Signature, batches: tuple[int, int, int], platform: str, kind: str
) -> dict[str, Any]:
    images = signature.images
    zeros = {"data_type": images.data_type, "dims": images.dims, "zero_data": True}
    sizes = sorted(set(batches))
    return {
        "name": name,
        "platform": platform,
        "max_batch_size": sizes[-1],
        "input": [images.fields],
        "output": _labelled(signature.outputs),
        "instance_group": [{"kind": kind, "count": 1}],
        "dynamic_batching": {
            "preferred_batch_size": sizes[1:] or sizes,
            "max_queue_delay_microseconds": _QUEUE_DELAY_US,
        },
        "model_warmup": [
            {"name": f"black_{s}", "batch_size": s, "inputs": _entries({images.name: zeros})}
            for s in sizes
        ],
    }


def _entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a protobuf map in its printed form: repeated pairs of `key` and `value`."""
    return [{"key": key, "value": value} for key, value in mapping.items()]


def _labelled(outputs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Return the fields of outputs, with class names for the probabilities."""
    labels = {"probabilities": {"label_filename": LABELS}}
    return [{**tensor.fields, **labels.get(tensor.name, {})} for tensor in outputs]
