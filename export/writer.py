"""Write a bundle, whole or not at all."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from capt_deploy.bundle import MANIFEST, REPORT, TEXT_EMBEDDINGS
from capt_deploy.classifier import Classifier
from capt_deploy.console import say
from capt_deploy.errors import BundleError, GateError
from capt_deploy.files import expand_home, new_folder, write_bytes, write_json
from capt_deploy.manifest import FileRecord, Graph, Manifest
from capt_deploy.version import __version__
from capt_train.run import TunedModel, load_run
from export.fold import fold, fold_zero_shot
from export.gate import run_gate
from export.onnx_graph import OPSET, trace
from export.visual import VisualClassifier

PRECISION = "fp32"
_ONNX = "model.onnx"
# What a reader of the bundle may want to know; folders of the machine it came from are not in it.
_PROVENANCE = (
    *("method", "added", "without", "classes", "shots", "seed", "templates", "context_init"),
    *("data_fingerprint", "model_sha256", "versions"),
)


def export_run(run: str | Path, out: str | Path, gate_data: str | Path | None = None) -> Path:
    """Fold a finished run, export it, check it on real images, and write the bundle.

    Args:
        run: a run folder.
        out: the bundle folder to write; it must not be there yet.
        gate_data: where the run's data set lies now, if it has moved.

    Returns:
        `out`.

    Raises:
        GateError: the exported graph does not say the same; nothing is written.
        CaptError: the run cannot be loaded or exported, or `out` exists.
    """
    out = expand_home(out)
    if out.exists():
        raise BundleError(f"{out}: already there; remove it or choose another --out")
    model = load_run(run)
    say(f"exporting {model.config.model} with {len(model.class_names)} classes")
    root = expand_home(gate_data) if gate_data is not None else Path(model.config.data)
    root = root if root.is_dir() else root.parent
    images = [root / item.path for item in model.split.val or model.split.train]
    with new_folder(out) as folder:
        manifest, report = _write_graph(model, folder)
        result = run_gate(model, Classifier.load(folder), images)
        if result.failures:
            raise GateError(
                f"{out} was not written, for on {result.images} images the graph differs from the "
                f"trained model: {'; '.join(result.failures)}"
            )
        write_json(folder / REPORT, {**report, "gate": {PRECISION: result.to_dict()}})
        _write_manifest(folder, manifest)
    say(
        f"checked on {result.images} images: top-1 agreement {result.top1_agreement:.4f}, "
        f"max |Δlogit| {result.max_logit_difference:.1e}"
    )
    return out


def make_manifest(model: TunedModel) -> Manifest:
    """Return the manifest of a bundle, without the hashes of its files."""
    names = model.class_names
    worst = sorted(model.fitted.pairs.items(), key=lambda pair: -pair[1])
    spec = model.config.model
    if spec.startswith("local-dir:"):
        spec = f"local-dir:{Path(spec.removeprefix('local-dir:')).name}"
    return Manifest(
        class_names=names,
        tuned=model.tuned,
        preprocess=model.backbone.preprocess,
        graphs={PRECISION: Graph(_ONNX, OPSET)},
        calibration={PRECISION: _calibration(model)},
        confusion_pairs=tuple(
            {"true": names[true], "predicted": names[predicted], "count": count}
            for (true, predicted), count in worst
        ),
        training={
            "capt": __version__,
            "model": spec,
            "pretrained": model.config.pretrained and Path(model.config.pretrained).name,
            **{key: model.provenance[key] for key in _PROVENANCE},
            "parts": sorted(model.learner.parts(model.config)),
            "strength": model.fitted.strength,
        },
    )


def _calibration(model: TunedModel) -> dict[str, float]:
    own = {"temperature": model.fitted.temperature}
    if not model.moves_images:
        own["zero_shot_temperature"] = model.fitted.zero_shot_temperature
    return own


def _write_graph(model: TunedModel, folder: Path) -> tuple[Manifest, dict[str, Any]]:
    head = fold(model)
    manifest = make_manifest(model)
    network = VisualClassifier(model.learner.backbone, head, model.visual)
    height, width = model.backbone.preprocess.size
    described = json.dumps(manifest.to_dict(), ensure_ascii=False, allow_nan=False)
    graph = trace(network, height, width, described)
    write_bytes(folder / _ONNX, graph.data)
    rows = {
        "text_embeddings": head.weight.cpu().contiguous(),
        "bias": head.bias.cpu(),
    }
    if not model.moves_images:  # else the graph's embeddings are not what these rows are for
        rows["zero_shot"] = fold_zero_shot(model).weight.cpu().contiguous()
    write_bytes(folder / TEXT_EMBEDDINGS, save(rows))
    _write_manifest(folder, manifest)
    report = {
        "graph": {"opset": graph.opset, "nodes": graph.nodes, "bytes": len(graph.data)},
        "normalisation": "explicit" if network.normalises else "folded into the patch convolution",
    }
    return manifest, report


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with a hash of every file that is in the folder by now."""
    records = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST:
            data = file.read_bytes()
            records[file.name] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    write_json(folder / MANIFEST, replace(manifest, files=records).to_dict())
