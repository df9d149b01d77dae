"""A bundle whose probabilities are the pixels that its graph gets, so that a reader shows them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from capt_deploy.bundle.manifest import METADATA_KEY, PRECISION_KEY
from capt_deploy.data.preprocess import PreprocessConfig

OPSET = 20


def write_pixel_bundle(folder: Path, preprocess: PreprocessConfig, weights: str = "") -> Path:
    """Write a bundle with a class for each value of each pixel; return its folder.

    `weights` is the name of a second file for the graph's only weight.
    """
    classes = int(np.prod(preprocess.size)) * 3
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "class_names": [str(index) for index in range(classes)],
        "tuned": [True] * classes,
        "preprocess": preprocess.to_dict(),
        "graphs": {"fp32": {"file": "model.onnx", "opset": OPSET, "weights": weights or None}},
        "calibration": {"fp32": {"temperature": 1.0}},
        "confusion_pairs": [],
        "training": {},
    }
    metadata = {METADATA_KEY: json.dumps(manifest), PRECISION_KEY: "fp32"}
    white = numpy_helper.from_array(np.float32(255), "white")
    contents = {weights: white.raw_data} if weights else {}
    if weights:
        set_external_data(white, weights)
        white.ClearField("raw_data")
    contents["model.onnx"] = _graph(preprocess.size, classes, metadata, white)
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    return folder


def _graph(
    size: tuple[int, int], classes: int, metadata: dict[str, str], white: TensorProto
) -> bytes:
    outputs = ("logits", "probabilities", "embedding")
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["logits"]),
        helper.make_node("Div", ["logits", "white"], ["probabilities"]),
        helper.make_node("Identity", ["logits"], ["embedding"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *size, 3])
    rows = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        for name in outputs
    ]
    graph = helper.make_graph(nodes, "pixels", [images], rows, [white])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    helper.set_model_props(model, metadata)
    return bytes(model.SerializeToString())
