"""Image to label: the exported graph beside plain open_clip, in one run and in turns.

    python -m benchmarks.latency

Both get the same JPEGs in memory and the same number of threads. Architectures have their real
sizes and random weights: what they cost does not depend on their values. Cells stay in
benchmarks/results/latency.json, one for each model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.exported import MODELS, Exported, export_model
from benchmarks.record import QUIET, add_cells, load_average, load_cells, write_docs
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.bench.cases import BenchRequest, open_cases
from capt_deploy.bench.images import Photos, synthetic_photos
from capt_deploy.bench.measure import BenchOptions, Case, Threads, measure
from capt_deploy.bundle.read import REPORT
from capt_deploy.core.console import Command, print_json, say, table
from capt_deploy.core.errors import BackendError, BundleError
from capt_deploy.core.files import read_json
from capt_deploy.core.machine import usable_cores
from capt_deploy.serving.classifier import Classifier

NAME = "latency"
README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs" / "embedding.md"
# Times the throughput of plain open_clip in float32 on the CPU, by precision and batch.
GOALS: Mapping[tuple[str, int], float] = {
    ("fp32", 1): 1.5,
    ("bf16", 1): 2.5,
    ("bf16", 32): 2.0,
    ("int8-cpu", 1): 3.5,
    ("int8-cpu", 32): 2.5,
}
AUTOCAST = "bf16 autocast"  # of torch
CPU_BACKENDS = ("onnxruntime-cpu", "openvino")
_PHOTOS = 32
_ENOUGH = 20  # runs, for a median that one may quote
_KEYS = ("backend", "device", "precision", "scope", "batch")  # of what a ratio belongs to


@dataclass(frozen=True)
class Comparison:
    """Settings of the comparison of a bundle with plain open_clip."""

    request: BenchRequest
    device: str = "cpu"  # of torch
    plain_precisions: tuple[str, ...] = ("fp32",)  # or `AUTOCAST`
    compiled: bool = True  # torch.compile as well


@click.command(cls=Command)
@click.option("--models", default="ViT-B/16,photo model", show_default=True)
@click.option("--precisions", default="fp32,bf16,int8", show_default=True, help="Of the bundle.")
@click.option("--batch", default="1,32", show_default=True)
@click.option("--scopes", default="image_to_label", show_default=True)
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Of measuring, for each row.")
@click.option("--threads", type=click.IntRange(1), help="By default all cores.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep the exported bundles here.")
@click.option("--json", "as_json", is_flag=True, help="Print the cells; write no file.")
def main(
    models: str,
    precisions: str,
    batch: str,
    scopes: str,
    device: str,
    seconds: float,
    threads: int | None,
    compiled: bool,
    work: Path | None,
    as_json: bool,
) -> None:
    """Measure models one after the other, and print the tables."""
    names = models.split(",")
    if unknown := set(names) - set(MODELS):
        raise click.BadParameter(f"expected of {', '.join(MODELS)}, came {min(unknown)}")
    written, on_cpu = tuple(precisions.split(",")), device == "cpu"
    request = BenchRequest(
        backends=CPU_BACKENDS if on_cpu else ("gpu",),
        precisions=tuple("int8-cpu" if on_cpu and p == "int8" else p for p in written),
        batches=tuple(map(int, batch.split(","))),
        scopes=tuple(scopes.split(",")),
        threads=threads or usable_cores(),
    )
    plain = ("fp32", AUTOCAST) if on_cpu else ("fp32", "fp16")
    comparison = Comparison(request, device, plain, compiled)
    cells: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        load = load_average()  # before exporting, which is a load itself
        # Threads of torch spin while they wait for each other: on a busy machine they take many
        # times as long, and a comparison is worthless.
        if load is not None and load > QUIET:
            say(f"the machine is busy (load {load:.1f}): no figure of this run is worth keeping")
        for name in names:
            say(f"exporting {name}")
            exported = export_model(name, work or Path(scratch), written)
            say(f"measuring {name} with {request.threads} threads")
            cells[name] = compare(exported, comparison, BenchOptions(seconds=seconds), load)
            if not as_json:
                add_cells(NAME, cells)
                if on_cpu:
                    write_docs(DOCS, NAME, docs_table(load_cells(NAME)))
                    write_docs(README, NAME, readme_line(load_cells(NAME)["ViT-B/16"]))
    if as_json:
        print_json(cells)
    else:
        click.echo("\n\n".join(text_of(name, cell) for name, cell in cells.items()))


def compare(
    exported: Exported, comparison: Comparison, options: BenchOptions, load: float | None = None
) -> dict[str, Any]:
    """Measure a bundle and the model that it was made from, in turns.

    Args:
        exported: bundle and model.
        comparison: what is measured.
        options: how long it is measured.
        load: of the machine before this program began to compute; None where unknown.
    """
    import torch

    from benchmarks.plain_open_clip import same_labels

    request = comparison.request
    torch.set_num_threads(request.threads or usable_cores())
    photos = synthetic_photos(_PHOTOS)
    with ExitStack() as stack, Threads(1) as threads:
        cases = [
            *_ours(exported, comparison, photos, threads, stack),
            *_plain(exported, comparison, photos),
        ]
        rows = measure(cases, options)
    return {
        "rows": rows,
        "ratios": ratios(rows),
        "same_labels": same_labels(
            exported.model, exported.bundle, comparison.device, photos, rows
        ),
        "threads": request.threads,
        "load_before": load,
        **({"auto": _chosen(exported.bundle, request)} if comparison.device == "cpu" else {}),
    }


def _chosen(bundle: Path, request: BenchRequest) -> dict[str, Any]:
    """Return what `auto` takes on this CPU, and which graphs the bundle's gate has passed."""
    options = RuntimeOptions(threads=request.threads)
    with Classifier.load(bundle, options=options) as classifier:
        chosen = {"backend": classifier.backend.name, "precision": classifier.precision}
    gate = read_json(bundle / REPORT, BundleError)["gate"]
    return {**chosen, "gate": {name: result["passed"] for name, result in gate.items()}}


def _ours(
    exported: Exported,
    comparison: Comparison,
    photos: Photos,
    threads: Threads,
    stack: ExitStack,
) -> Iterator[Case]:
    request = comparison.request
    for backend in request.backends:
        one = replace(request, backends=(backend,))
        for precision in request.precisions:
            try:
                one = replace(one, precisions=(precision,))
                yield from open_cases(exported.bundle, one, photos, threads, stack)
            except BackendError as cause:
                say(f"not measured: {cause}")


def _plain(exported: Exported, comparison: Comparison, photos: Photos) -> Iterator[Case]:
    from benchmarks.plain_open_clip import PlainOpenClip, plain_cases

    request = comparison.request
    for precision in comparison.plain_precisions:
        make = partial(PlainOpenClip, exported.model, exported.bundle, comparison.device, precision)
        # Compiling takes a minute for each batch: only what is fastest.
        both = comparison.compiled and precision == comparison.plain_precisions[-1]
        for compiled in (False, True) if both else (False,):
            yield from plain_cases(
                make, precision, compiled, request.batches, request.scopes, photos
            )


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times the throughput of plain open_clip each row has.

    On a CPU plain is eager open_clip in float32. On a GPU it has the row's own precision, or
    float32 where it was not measured in that one, as it never is in int8: `eager_precision` says
    which.
    """
    eager = {
        (row["scope"], row["batch"], row["precision"]): row["throughput_per_s"]
        for row in rows
        if row["backend"] == "open_clip eager" and row["precision"] != AUTOCAST
    }
    result = []
    for row in rows:
        for precision in (row["precision"], "fp32"):
            plain = eager.get((row["scope"], row["batch"], precision))
            if plain is not None:
                ratio = row["throughput_per_s"] / plain
                keys = {key: row[key] for key in _KEYS}
                result.append({**keys, "ratio": ratio, "eager_precision": precision})
                break
    return result


def text_of(name: str, cell: Mapping[str, Any]) -> str:
    """Return a table of a model's rows, and whether the goal is reached."""
    times_eager = {_key(row): row["ratio"] for row in cell["ratios"]}
    header = (name, "device", "precision", "batch", "p50 ms", "p99 ms", "images/s", "times eager")
    lines = [
        (
            *(row["backend"], row["device"], row["precision"], str(row["batch"])),
            *(f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['throughput_per_s']:.2f}"),
            f"{times_eager[_key(row)]:.2f}" if _key(row) in times_eager else "",
        )
        for row in cell["rows"]
    ]
    text = f"{table(header, lines)}\n{verdict(cell)}"
    few = [" ".join(line[:4]) for line, row in zip(lines, cell["rows"], strict=True) if _few(row)]
    return f"{text}; fewer than {_ENOUGH} runs: {', '.join(few)}" if few else text


def _few(row: Mapping[str, Any]) -> bool:
    return bool(row["iterations"] < _ENOUGH)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in _KEYS)


def verdict(cell: Mapping[str, Any]) -> str:
    """Return which goals the best of our ratios reach, and whether `auto` takes the fastest."""
    ours = [
        row
        for row in cell["ratios"]
        if row["scope"] == "image_to_label" and not row["backend"].startswith("open_clip")
    ]
    parts = []
    for (precision, batch), goal in GOALS.items():
        found = [r["ratio"] for r in ours if (r["precision"], r["batch"]) == (precision, batch)]
        if found:
            reached = "reached" if max(found) >= goal else "missed"
            parts.append(f"{precision} batch {batch}: {goal} {reached} ({max(found):.2f})")
    slower = [" ".join(map(str, _key(row))) for row in ours if row["ratio"] < 1]
    parts.append(f"slower than plain open_clip: {', '.join(slower) or 'none'}")
    if (auto := cell.get("auto")) is not None:
        passed = [r for r in ours if r["batch"] == 1 and auto["gate"][r["precision"]]]
        best = max(passed, key=lambda row: float(row["ratio"]), default=None)
        if best is not None:
            parts.append(
                f"auto takes {auto['backend']} {auto['precision']}; the fastest row at batch 1 "
                f"that passed the gate is {best['backend']} {best['precision']}"
            )
    return "\n".join(parts)


def docs_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the documentation's table of images a second."""
    lines = ["| | | one at a time | times | 32 at once | times |", "|---|---|---|---|---|---|"]
    for name, cell in cells.items():
        factors = {_key(row): row["ratio"] for row in cell["ratios"]}
        rows = {_key(row): row for row in cell["rows"] if row["scope"] == "image_to_label"}
        for key in (key for key in rows if key[-1] == 1):
            pair = key, (*key[:-1], 32)
            figures = [f"{rows[k]['throughput_per_s']:.1f} | {factors[k]:.2f}" for k in pair]
            lines.append(f"| {name} | {key[0]}, {key[2]} | {' | '.join(figures)} |")
    return "\n".join(lines)


def readme_line(cell: Mapping[str, Any]) -> str:
    """Return the README's line: the best of our ratios in each precision, at batches 1 and 32."""
    best: dict[tuple[str, int], float] = {}
    for row in cell["ratios"]:
        key = row["precision"], row["batch"]
        if not row["backend"].startswith("open_clip"):
            best[key] = max(best.get(key, 0.0), row["ratio"])
    names = {"int8-cpu": "int8", "bf16": "bfloat16", "fp32": "float32"}
    figures = [
        f"{best[precision, 1]:.2f} and {best[precision, 32]:.2f} times in {name}"
        for precision, name in names.items()
    ]
    return f"{', '.join(figures)} ([table](docs/embedding.md#on-a-cpu))."


if __name__ == "__main__":
    main()
