"""Export every family in every precision: checked in ONNX Runtime, built by TensorRT-RTX.

    python -m benchmarks.export_matrix --docs

Architectures have their real sizes and random weights; the statistics of their batch norms are
those of the photos. Each family is tuned by `capt-train --method zeroshot` on a few photos, and
each precision exported by its own `capt-export`, for the seconds and peak memory of a user.
The photo model is that of the tests, its prompt tuned on the base classes of CIFAR-100.
Rows that are measured stay in benchmarks/results/export_matrix.json; `--again` measures anew.
Nothing runs on a GPU: engines are built, not run.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.exported import copy_photos
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import read_json
from capt_deploy.verify.gate import LIMITS

# Architecture of open_clip, and how many photos it is checked on.
FAMILIES: Mapping[str, tuple[str, int]] = {
    "photo model": ("", 1000),
    "ViT-B/32": ("ViT-B-32", 16),
    "ViT-B/16": ("ViT-B-16", 64),
    "ViT-L/14": ("ViT-L-14", 8),
    "ViT-L/14 336": ("ViT-L-14-336", 8),
    "EVA02-B/16": ("EVA02-B-16", 16),
    "timm ViT-M/16": ("vit_medium_patch16_gap_256", 16),
    "MobileCLIP-S1": ("MobileCLIP-S1", 16),
    "MobileCLIP-B": ("MobileCLIP-B", 16),
    "SigLIP B/16": ("ViT-B-16-SigLIP", 16),
    "ResNet-50": ("RN50", 16),
}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
SMS = (75, 80, 86, 89, 120)
DOCS = Path(__file__).parents[1] / "docs" / "export.md"
NAME = "export_matrix"
_GATE = (
    *("images", "top1_agreement", "max_logit_difference", "embedding_cosine"),
    *("accuracy_difference", "ece_difference", "passed", "failures"),
)
_SHARED = Path(__file__).parents[2] / "shared"


@click.command(cls=Command)
@click.option("--families", default=",".join(FAMILIES), show_default=True)
@click.option("--precisions", default=",".join(PRECISIONS), show_default=True)
@click.option("--again", is_flag=True, help="Measure these rows anew.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/export.md as well.")
def main(families: str, precisions: str, again: bool, only_table: bool, docs: bool) -> None:
    """Measure the rows that are missing, and print the table."""
    rows = load()
    for family in [] if only_table else [name.strip() for name in families.split(",")]:
        missing = [p for p in precisions.split(",") if again or f"{family} / {p}" not in rows]
        if missing:
            _measure(family, missing, rows)
    table = markdown(rows)
    click.echo(table)
    if docs:
        write_docs(DOCS, NAME, table)
        write_docs(DOCS, "limits", limits())


def limits() -> str:
    """Return the gate's limits, a line for each precision."""
    titles = [field.replace("_", " ") for field in asdict(LIMITS["fp32"])]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for precision, values in LIMITS.items():
        cells = " | ".join(f"{value:g}" for value in asdict(values).values())
        lines.append(f"| {precision} | {cells} |")
    return "\n".join(lines)


def load() -> dict[str, dict[str, Any]]:
    """Return the rows that are measured, by `family / precision`."""
    return load_cells(NAME)


def _measure(family: str, precisions: list[str], rows: dict[str, dict[str, Any]]) -> None:
    architecture, images = FAMILIES[family]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, photos, model, method = folder / "run", folder / "photos", folder / "model", "zeroshot"
        if architecture:
            copy_photos(photos, images)
            _run("benchmarks.random_models", architecture, model, photos)
        else:
            photos, method = _SHARED / "data" / "cifar100", "coop"
            model = _SHARED / "models" / "tinyclip-cifar"
        _tune(photos, model, run, method)
        for precision in precisions:
            say(f"{family}, {precision}")
            measured = _export(run, folder / f"{precision}.capt", precision, images)
            key = f"{family} / {precision}"
            rows[key] = {"family": family, "precision": precision, **measured}
            add_cells(NAME, {key: rows[key]})


def _tune(photos: Path, model: Path, run: Path, method: str) -> None:
    classes = "base" if method == "coop" else "all"
    spec = ["--data", photos, "--model", f"local-dir:{model}", "--classes", classes]
    _run("benchmarks.command", "capt-train", *spec, "--method", method, "--out", run)


def _export(run: Path, out: Path, precision: str, images: int) -> dict[str, Any]:
    start = time.perf_counter()
    options = ["--out", out, f"--{precision}", "--gate-images", images, "--force"]
    done = _run("benchmarks.command", "capt-export", run, *options)
    seconds = time.perf_counter() - start
    report = read_json(out / "report.json", DataError)
    onnx = next(path for path in out.iterdir() if path.suffix == ".onnx")
    return {
        "seconds": seconds,
        "peak_bytes": done["peak_bytes"],
        "weight_bytes_float32": _model_bytes(run),
        "graph": {key: report["graphs"][precision][key] for key in ("nodes", "weight_bytes")},
        "gate": {key: report["gate"][precision][key] for key in _GATE},
        "engines": {str(sm): _engine(onnx, sm) for sm in SMS},
    }


def _model_bytes(run: Path) -> int:
    """Return the bytes of the float32 weights of the run's model."""
    model = read_json(run / "config.json", DataError)["config"]["model"].removeprefix("local-dir:")
    return (Path(model) / "open_clip_model.safetensors").stat().st_size


def _engine(onnx: Path, sm: int) -> dict[str, Any]:
    from capt_deploy.backends.tensorrt.engine import build_engine
    from capt_deploy.core.errors import BackendError

    start = time.perf_counter()
    folder = onnx.parent if onnx.with_name(f"{onnx.name}.data").exists() else None
    try:
        engine = build_engine(onnx.read_bytes(), sm=sm, weights_folder=folder)
    except BackendError as cause:
        return {"built": False, "reason": str(cause)}
    return {"built": True, "bytes": len(engine), "seconds": time.perf_counter() - start}


def _run(module: str, *arguments: Any) -> dict[str, Any]:
    """Run a command in its own process; return the JSON of its last line."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)} exited with {done.returncode}")
    lines = done.stdout.strip().splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return result


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each family and precision."""
    header = (
        *("family", "precision", "top-1 same", "max \\|Δlogit\\|", "cosine ≥", "gate", "nodes"),
        *("weights, MB", "export, s", "peak / fp32 weights", "TensorRT-RTX builds for SM"),
    )
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    order = {name: place for place, name in enumerate(FAMILIES)}
    for row in sorted(
        rows.values(), key=lambda r: (order[r["family"]], PRECISIONS.index(r["precision"]))
    ):
        gate, graph = row["gate"], row["graph"]
        built = [sm for sm, engine in row["engines"].items() if engine["built"]]
        cells = (
            row["family"],
            row["precision"],
            f"{100 * gate['top1_agreement']:.1f} % of {gate['images']}",
            f"{gate['max_logit_difference']:.1e}",
            f"{gate['embedding_cosine']:.5f}",
            "passed" if gate["passed"] else "FAILED",
            str(graph["nodes"]),
            f"{graph['weight_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / row['weight_bytes_float32']:.1f}",
            ", ".join(built) or "none",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
