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
from benchmarks.latency_tables import KEYS, docs_table, readme_line, text_of
from benchmarks.record import QUIET, add_cells, load_average, load_cells, write_docs
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.bench.cases import BenchRequest, open_cases
from capt_deploy.bench.images import Photos, synthetic_photos
from capt_deploy.bench.measure import BenchOptions, Case, Threads, measure
from capt_deploy.bundle.read import REPORT
from capt_deploy.core.console import Command, print_json, say
from capt_deploy.core.errors import BackendError, BundleError
from capt_deploy.core.files import read_json
from capt_deploy.core.machine import usable_cores
from capt_deploy.serving.classifier import Classifier

NAME = "latency"
README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs" / "embedding.md"
AUTOCAST = "bf16 autocast"  # of torch
CPU_BACKENDS = ("onnxruntime-cpu", "openvino")
_PHOTOS = 32


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
                keys = {key: row[key] for key in KEYS}
                result.append({**keys, "ratio": ratio, "eager_precision": precision})
                break
    return result


if __name__ == "__main__":
    main()
