"""Write a model repository for NVIDIA's Triton Inference Server."""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt_deploy.backends.options import BATCHES, check_batches
from capt_deploy.bundle.read import Bundle
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.core.files import expand_home, new_folder, refuse_existing
from capt_deploy.core.version import __version__
from export.triton.configs import (
    LABELS,
    Signature,
    ensemble_config,
    onnx_config,
    plan_config,
    preprocess_config,
    read_signature,
    shape,
    tensorrt_config,
)
from export.triton.pbtxt import to_pbtxt

ONNX = "model.onnx"
CONFIG = "config.pbtxt"
_PYTHON_MODEL = Path(__file__).with_name("triton_preprocess.py")
_CACHE = "/tmp"  # of the server: ONNX Runtime makes only the last folder of a cache's path
_GUIDE = """\
# {name}: a model repository for Triton

    pip install capt-{version}-py3-none-any.whl  # on the server, for {name}_preprocess
    tritonserver --model-repository=.

| model | takes | runs |
|---|---|---|
{rows}

`{name}` is the one to call: `image` holds encoded files (JPEG, PNG, …), as bytes, of shape
(batch, 1). Ask for `probabilities` with a class count to get class names. A broken image fails its
own request alone. The other models take `images`: {pixels} uint8 pixels.

TensorRT needs a GPU, and Triton ends when a model cannot be loaded. To serve some models alone, as
without a GPU, name them:

    tritonserver --model-repository=. --model-control-mode=explicit {load}

## TensorRT

`*_tensorrt` build their engines on first loading, which takes minutes, and keep them below {cache}.
Mount a volume there, that nobody else can write to, to keep them longer. To use TensorRT's
own backend instead, build a plan on the server, then start it with `--model-config-name=plan`:

{plans}

Strong typing keeps the types of the ONNX file; TensorRT 11 knows nothing else.
"""


@dataclass(frozen=True)
class _Variant:
    """One graph of the bundle, as two models."""

    precision: str
    signature: Signature
    onnx: str | None  # the models' names; None where ONNX Runtime has no kernels
    tensorrt: str

    @property
    def served(self) -> str:
        return self.onnx or self.tensorrt


def write_triton(
    bundle: Bundle,
    out: str | Path,
    name: str | None = None,
    batches: tuple[int, int, int] = BATCHES,
) -> Path:
    """Write a model repository, whole or not at all.

    It holds `NAME_onnx` and `NAME_tensorrt` for the bundle's first graph, `NAME_PRECISION_onnx`
    and `NAME_PRECISION_tensorrt` for each further one, `NAME_preprocess`, which makes pixels of
    encoded images, and `NAME`, which is that followed by the first graph.

    Args:
        bundle: the bundle to serve.
        out: the folder to write; it must not be there yet.
        name: of the models; the bundle's own by default.
        batches: smallest, usual and largest number of images that run at once.

    Returns:
        `out`.

    Raises:
        BundleError: `out` exists, or the bundle is damaged or cannot be served by Triton.
        ConfigError: Triton cannot take that name.
        BackendError: the batches do not rise.
    """
    out = expand_home(out)
    refuse_existing(out, BundleError)
    check_batches(batches)
    name = _check_name(name or _name_of(bundle))
    labels = _labels(bundle)
    with new_folder(out) as folder:
        variants = [
            _write_graph(
                folder, bundle, precision, f"{name}_{precision}" if later else name, batches
            )
            for later, precision in enumerate(bundle.manifest.graphs)
        ]
        first, largest = variants[0], batches[2]
        images, steps = first.signature.images, (f"{name}_preprocess", first.served)
        python = preprocess_config(steps[0], images, largest, bundle.manifest.preprocess)
        shutil.copyfile(_PYTHON_MODEL, _write_model(folder, python) / "model.py")
        ensemble = ensemble_config(name, steps, first.signature, largest)
        # An ensemble's version is an empty folder, which neither git nor object stores keep.
        (_write_model(folder, ensemble, labels) / ".keep").touch()
        (folder / "README.md").write_text(_guide(name, steps, variants, batches), encoding="utf-8")
    return out


def _write_graph(
    folder: Path, bundle: Bundle, precision: str, name: str, batches: tuple[int, int, int]
) -> _Variant:
    """Write both models of one graph. Only that graph is in memory meanwhile."""
    data = bundle.read(bundle.manifest.graphs[precision].file)
    signature = read_signature(data, f"{bundle.path}, {precision}")
    pixels = (*bundle.manifest.preprocess.size, 3)
    if signature.images.dims != pixels:
        raise BundleError(f"{bundle.path}: its {precision} graph does not take {pixels} pixels")
    # ONNX Runtime has no bfloat16 products or convolutions for the CPU.
    onnx = None if precision == "bf16" else f"{name}_onnx"
    variant = _Variant(precision, signature, onnx, f"{name}_tensorrt")
    cache = f"{_CACHE}/{name}_{_fingerprint(bundle, precision)}"
    configs = [tensorrt_config(variant.tensorrt, signature, batches, cache)]
    if onnx:
        configs.append(onnx_config(onnx, signature, batches, precision))
    labels = _labels(bundle)
    versions = [_write_model(folder, config, labels) for config in configs]
    for version in versions:
        (version / ONNX).write_bytes(data)
        _copy_weights(bundle, precision, signature, version)
    plan = folder / variant.tensorrt / "configs" / "plan.pbtxt"
    plan.parent.mkdir()
    plan.write_text(to_pbtxt(plan_config(variant.tensorrt, signature, batches)), encoding="utf-8")
    return variant


def _fingerprint(bundle: Bundle, precision: str) -> str:
    """Return what changes with the content of a graph and of its weights."""
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


def _copy_weights(bundle: Bundle, precision: str, signature: Signature, version: Path) -> None:
    """Put the weights beside a graph of over 2 GB; ONNX's readers refuse links to them."""
    name = bundle.manifest.graphs[precision].weights
    if signature.weight_files != ((name,) if name else ()):
        raise BundleError(
            f"{bundle.path}: its {precision} graph has weights in {signature.weight_files}, the "
            f"manifest says {name!r}; export it again"
        )
    if name:
        shutil.copyfile(bundle.verified_folder(name) / name, version / name)


def _labels(bundle: Bundle) -> bytes:
    names = bundle.manifest.class_names
    if broken := [name for name in names if "\n" in name or "\r" in name]:
        raise BundleError(
            f"{bundle.path}: Triton reads class names line by line, but {broken[0]!r} holds a line "
            f"break; export it again with another name"
        )
    return "".join(f"{name}\n" for name in names).encode()


def _name_of(bundle: Bundle) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", bundle.path.resolve().stem).strip("_") or "classifier"


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"model name {name!r}: expected letters, digits, '_', '-' and '.' only")
    return name


def _guide(
    name: str, steps: tuple[str, str], variants: list[_Variant], batches: tuple[int, int, int]
) -> str:
    images = variants[0].signature.images
    rows = [
        f"| {name} | encoded images | {steps[0]}, then {steps[1]} |",
        f"| {steps[0]} | encoded images | `capt_deploy.data.preprocess`, in Python |",
    ]
    plans = []
    for variant in variants:
        if variant.onnx:
            rows.append(f"| {variant.onnx} | pixels | ONNX Runtime, {variant.precision} |")
        rows.append(f"| {variant.tensorrt} | pixels | TensorRT, {variant.precision} |")
        options = " ".join(
            f"--{which}Shapes={shape(images, size)}"
            for which, size in zip(("min", "opt", "max"), batches, strict=True)
        )
        file = f"{variant.tensorrt}/1/model"
        plans.append(
            f"    trtexec --stronglyTyped --onnx={file}.onnx --saveEngine={file}.plan {options}"
        )
    pixels = "×".join(map(str, ("batch", *images.dims)))
    return _GUIDE.format(
        version=__version__,
        **{"name": name, "rows": "\n".join(rows), "pixels": pixels, "cache": _CACHE},
        load=" ".join(f"--load-model={model}" for model in (*steps, name)),
        plans="\n".join(plans),
    )
