"""Write a model repository for NVIDIA's Triton Inference Server."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from capt_deploy.backends.options import BATCHES
from capt_deploy.bundle.read import Bundle
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import expand_home, new_folder, refuse_existing
from capt_deploy.core.version import __version__
from export.graph.lower import BF16, INT8_CPU
from export.triton.configs import (
    LABELS,
    Signature,
    ensemble_config,
    onnx_config,
    plan_config,
    preprocess_config,
    tensorrt_config,
    to_pbtxt,
)

ONNX = "model.onnx"
CONFIG = "config.pbtxt"
_PREPROCESS_MODEL = Path(__file__).with_name("preprocess_model.py")
_CACHE = "/tmp"  # of the server: ONNX Runtime makes only the last folder of a cache's path
_GUIDE = """\
# {name}: a model repository for Triton

    pip install capt-{version}-py3-none-any.whl  # on the server, for {name}_preprocess
    tritonserver --model-repository=.

| model | takes | runs |
|---|---|---|
| {name} | encoded images | {preprocess}, then {served} |
| {preprocess} | encoded images | `capt_deploy.data.preprocess`, in Python |
{rows}

`{name}` is the one to call: `image` holds encoded files (JPEG, PNG, …), as bytes, of shape
(batch, 1). Ask for `probabilities` with a class count to get class names. A broken image fails its
own request alone. The other models take `images`: {pixels} uint8 pixels.

TensorRT needs a GPU, and Triton ends when a model cannot be loaded. To serve some models alone, as
without a GPU, name them:

    tritonserver --model-repository=. --model-control-mode=explicit {load}

## TensorRT

`*_tensorrt` build their engines on first loading, which takes minutes, and keep them below {cache}.
To keep them longer, mount a volume there to which only the server can write. To use TensorRT's
own backend instead, build a plan on the server, then start it with `--model-config-name=plan`:

{plans}

Strong typing keeps the types of the ONNX file; TensorRT 11 has no other mode.
"""


def write_triton(bundle: Bundle, out: str | Path) -> Path:
    """Write a model repository, whole or not at all.

    It holds `NAME_onnx` and `NAME_tensorrt` for the bundle's first graph, `NAME_PRECISION_onnx`
    and `NAME_PRECISION_tensorrt` for each further one (as far as the runtime suits the precision),
    `NAME_preprocess`, which decodes and preprocesses images, and `NAME`, which runs that and then
    the first graph. NAME is the bundle's.

    Args:
        bundle: the bundle to serve.
        out: the folder to write; it must not exist.

    Returns:
        `out`.

    Raises:
        BundleError: `out` exists, or the bundle is damaged or cannot be served by Triton.
    """
    out = expand_home(out)
    refuse_existing(out, BundleError)
    name = re.sub(r"[^A-Za-z0-9]+", "_", bundle.path.resolve().stem).strip("_") or "classifier"
    signature, labels = Signature.from_bundle(bundle), _labels(bundle)
    preprocess, served = f"{name}_preprocess", ""
    rows, plans = [], []
    with new_folder(out) as folder:
        for place, precision in enumerate(bundle.manifest.graphs):
            graph_name = f"{name}_{precision.replace('-', '_')}" if place else name
            models = _write_graph(folder, bundle, precision, graph_name, signature, labels)
            served = served or next(iter(models))
            rows += [f"| {model} | pixels | {run}, {precision} |" for model, run in models.items()]
            if f"{graph_name}_tensorrt" in models:
                plans.append(_plan_command(f"{graph_name}_tensorrt/1/model", signature))
        largest = BATCHES[-1]
        config = preprocess_config(preprocess, signature, largest, bundle.manifest.preprocess)
        shutil.copyfile(_PREPROCESS_MODEL, _write_model(folder, config) / "model.py")
        ensemble = ensemble_config(name, preprocess, served, signature, largest)
        # An ensemble's version is an empty folder, which neither git nor object stores keep.
        (_write_model(folder, ensemble, labels) / ".keep").touch()
        guide = _GUIDE.format(
            **{"name": name, "preprocess": preprocess, "served": served, "cache": _CACHE},
            version=__version__,
            rows="\n".join(rows),
            pixels="×".join(map(str, ("batch", *signature.images.dims))),
            load=" ".join(f"--load-model={model}" for model in (preprocess, served, name)),
            plans="\n".join(plans),
        )
        (folder / "README.md").write_text(guide, encoding="utf-8")
    return out


def _write_graph(
    folder: Path, bundle: Bundle, precision: str, name: str, signature: Signature, labels: bytes
) -> dict[str, str]:
    """Write the models of one graph; return their names and the runtimes that run them."""
    tensorrt, onnx = f"{name}_tensorrt", f"{name}_onnx"
    cache = f"{_CACHE}/{name}_{_fingerprint(bundle, precision)}"
    models: dict[str, str] = {}
    configs: list[dict[str, Any]] = []
    if precision != BF16:  # ONNX Runtime has no bfloat16 products or convolutions for the CPU
        models[onnx] = "ONNX Runtime"
        configs.append(onnx_config(onnx, signature, BATCHES, precision))
    if precision != INT8_CPU:
        models[tensorrt] = "TensorRT"
        configs.append(tensorrt_config(tensorrt, signature, BATCHES, cache))
    graph = bundle.manifest.graphs[precision]
    data, weights = bundle.read(graph.file), graph.weights
    for config in configs:
        version = _write_model(folder, config, labels)
        (version / ONNX).write_bytes(data)
        if weights:  # of over 2 GB; ONNX's readers refuse links to them
            bundle.copy(weights, version / weights)
    if tensorrt in models:
        plan = folder / tensorrt / "configs" / "plan.pbtxt"
        plan.parent.mkdir()
        plan.write_text(to_pbtxt(plan_config(tensorrt, signature, BATCHES)), encoding="utf-8")
    return models


def _plan_command(file: str, signature: Signature) -> str:
    shapes = " ".join(
        f"--{which}Shapes={signature.shape(size)}"
        for which, size in zip(("min", "opt", "max"), BATCHES, strict=True)
    )
    return f"    trtexec --stronglyTyped --onnx={file}.onnx --saveEngine={file}.plan {shapes}"


def _fingerprint(bundle: Bundle, precision: str) -> str:
    """Return a name that changes with the content of a graph and of its weights."""
    graph = bundle.manifest.graphs[precision]
    files = [file for file in (graph.file, graph.weights) if file]
    hashes = "".join(bundle.manifest.files[file].sha256 for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def _write_model(folder: Path, config: dict[str, Any], labels: bytes | None = None) -> Path:
    """Write a model's configuration and class names; return the folder of its version 1."""
    model = folder / str(config["name"])
    version = model / "1"
    version.mkdir(parents=True)
    (model / CONFIG).write_text(to_pbtxt(config), encoding="utf-8")
    if labels is not None:
        (model / LABELS).write_bytes(labels)
    return version


def _labels(bundle: Bundle) -> bytes:
    names = bundle.manifest.class_names
    if broken := [name for name in names if "\n" in name or "\r" in name]:
        raise BundleError(
            f"{bundle.path}: Triton reads class names line by line, but {broken[0]!r} holds a line "
            f"break; export it again with another name"
        )
    return "".join(f"{name}\n" for name in names).encode()
