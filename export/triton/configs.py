"""Configurations of the models of a Triton repository, as dictionaries of their fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capt_deploy.backends.base import Outputs
from capt_deploy.core.errors import BundleError
from capt_deploy.data.preprocess import PreprocessConfig
from export.triton.pbtxt import Word, entries

LABELS = "labels.txt"
_QUEUE_DELAY_US = 1000  # how long a request may wait for others to share a batch with
_PREPROCESSES = 2  # at the same time, each in a process of its own


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model; `dims` leaves out the batch."""

    name: str
    kind: str  # Triton's name of the data type
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives."""

    images: Tensor
    outputs: tuple[Tensor, ...]
    weight_files: tuple[str, ...]  # beside the ONNX file, where it would exceed 2 GB


ENCODED = Tensor("image", "TYPE_STRING", (1,))  # one encoded file for each image of the batch


def read_signature(onnx_bytes: bytes, where: str) -> Signature:
    """Read a graph's input and outputs from its ONNX file.

    Raises:
        BundleError: it is no graph of ours.
    """
    import onnx

    try:
        graph = onnx.load_model_from_string(onnx_bytes).graph
    except Exception as cause:  # an error of protobuf's
        raise BundleError(f"{where}: not an ONNX file ({cause})") from cause
    inputs = [_tensor(value, where) for value in graph.input]
    outputs = tuple(_tensor(value, where) for value in graph.output)
    if len(inputs) != 1 or {tensor.name for tensor in outputs} != set(Outputs._fields):
        expected = ", ".join(Outputs._fields)
        raise BundleError(f"{where}: expected one input and the outputs {expected}")
    stored = (entry for tensor in graph.initializer for entry in tensor.external_data)
    files = {entry.value for entry in stored if entry.key == "location"}
    return Signature(inputs[0], outputs, tuple(sorted(files)))


def _tensor(value: Any, where: str) -> Tensor:
    from onnx import TensorProto

    kinds = {
        TensorProto.UINT8: "TYPE_UINT8",
        TensorProto.FLOAT: "TYPE_FP32",
        TensorProto.FLOAT16: "TYPE_FP16",
    }
    batch, *dims = value.type.tensor_type.shape.dim or [None]
    sizes = tuple(dim.dim_value for dim in dims)
    kind = kinds.get(value.type.tensor_type.elem_type)
    if kind is None or batch is None or batch.dim_value or 0 in sizes:
        raise BundleError(f"{where}: expected a free batch and fixed sizes of {value.name!r}")
    return Tensor(value.name, kind, sizes)


def onnx_config(
    name: str, signature: Signature, batches: tuple[int, int, int], precision: str
) -> dict[str, Any]:
    """Return the model that ONNX Runtime runs, on GPUs where there are some, else on the CPU."""
    config = _graph_config(name, signature, batches, "KIND_AUTO")
    config["platform"] = "onnxruntime_onnx"
    if precision != "fp32":
        # Triton's name for "basic"; see capt_deploy/backends/onnxruntime.py.
        config["optimization"] = {"graph": {"level": -1}}
    return config


def tensorrt_config(
    name: str, signature: Signature, batches: tuple[int, int, int], cache: str
) -> dict[str, Any]:
    """Return the model that ONNX Runtime hands to TensorRT, which builds its engine on loading.

    No `precision_mode` is given: only then TensorRT keeps to the types of the ONNX file.

    Args:
        cache: folder for the engine. ONNX Runtime tells graphs apart by their structure, not by
            their weights, so it has to be another folder for every graph.
    """
    config = _graph_config(name, signature, batches, "KIND_GPU")
    profile = {
        f"trt_profile_{which}_shapes": shape(signature.images, size)
        for which, size in zip(("min", "opt", "max"), batches, strict=True)
    }
    keep = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
    accelerator = {"name": "tensorrt", "parameters": entries({**profile, **keep})}
    config["platform"] = "onnxruntime_onnx"
    config["optimization"] = {
        "execution_accelerators": {"gpu_execution_accelerator": [accelerator]}
    }
    return config


def plan_config(name: str, signature: Signature, batches: tuple[int, int, int]) -> dict[str, Any]:
    """Return the model that TensorRT runs from a plan, once somebody has built that."""
    config = _graph_config(name, signature, batches, "KIND_GPU")
    config["platform"] = "tensorrt_plan"
    return config


def preprocess_config(
    name: str, images: Tensor, largest: int, preprocess: PreprocessConfig
) -> dict[str, Any]:
    """Return the Python model that makes pixels of encoded images."""
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": largest,
        "input": [_described(ENCODED)],
        "output": [_described(images)],
        "instance_group": [{"kind": Word("KIND_CPU"), "count": _PREPROCESSES}],
        "parameters": entries({"preprocess": {"string_value": json.dumps(preprocess.to_dict())}}),
    }


def ensemble_config(
    name: str, steps: tuple[str, str], signature: Signature, largest: int
) -> dict[str, Any]:
    """Return the model that clients call: preprocessing, then one of the graphs."""
    images, outputs = signature.images.name, [tensor.name for tensor in signature.outputs]
    maps = (
        ({ENCODED.name: ENCODED.name}, {images: images}),
        ({images: images}, dict(zip(outputs, outputs, strict=True))),
    )
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": largest,
        "input": [_described(ENCODED)],
        "output": _labelled(signature.outputs),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,  # the latest
                    "input_map": entries(taken),
                    "output_map": entries(given),
                }
                for model, (taken, given) in zip(steps, maps, strict=True)
            ]
        },
    }


def shape(images: Tensor, batch: int) -> str:
    """Return the shape of a batch as TensorRT's options write it: `images:8x224x224x3`."""
    return f"{images.name}:{'x'.join(map(str, (batch, *images.dims)))}"


def _graph_config(
    name: str, signature: Signature, batches: tuple[int, int, int], kind: str
) -> dict[str, Any]:
    images = signature.images
    zeros = {"data_type": Word(images.kind), "dims": images.dims, "zero_data": True}
    sizes = sorted(set(batches))
    return {
        "name": name,
        "max_batch_size": sizes[-1],
        "input": [_described(images)],
        "output": _labelled(signature.outputs),
        "instance_group": [{"kind": Word(kind), "count": 1}],
        "dynamic_batching": {
            "preferred_batch_size": sizes[1:] or sizes,
            "max_queue_delay_microseconds": _QUEUE_DELAY_US,
        },
        "model_warmup": [
            {
                "name": f"black_{size}",
                "batch_size": size,
                "inputs": entries({images.name: zeros}),
            }
            for size in sizes
        ],
    }


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": Word(tensor.kind), "dims": tensor.dims}


def _labelled(outputs: Sequence[Tensor]) -> list[Mapping[str, Any]]:
    """Describe outputs; class names belong to the probabilities."""
    names = {"probabilities": {"label_filename": LABELS}}
    return [{**_described(tensor), **names.get(tensor.name, {})} for tensor in outputs]
