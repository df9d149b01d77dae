"""`capt-bench`."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capt_deploy.core.console import Command, PathInHome, print_json, say, table
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.bench.cases import Photos


def _names(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Read comma-separated names, each once; nothing where the option is not given."""
    if value is None:
        return ()
    names = tuple(dict.fromkeys(filter(None, (one.strip() for one in value.split(",")))))
    if not names:
        raise click.BadParameter("expected at least one")
    return names


def _numbers(ctx: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    words = _names(ctx, option, value)
    if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise click.BadParameter(f"expected whole numbers from 1 on, came {wrong[0]}")
    return tuple(map(int, words))


def _finite(ctx: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"expected a number of seconds, came {value}")
    return value


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome())
@click.option(
    "--backend",
    "backends",
    callback=_names,
    metavar="A,B",
    default="auto",
    show_default=True,
    help="Some of auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu; or all, or gpu: "
    "those that work here.",
)
@click.option(
    "--batch",
    "batches",
    callback=_numbers,
    metavar="N,M",
    default="1,8,32",
    show_default=True,
    help="Images in a call.",
)
@click.option(
    "--precision",
    "precisions",
    callback=_names,
    metavar="A,B",
    help="Graphs of the bundle, such as fp32,int8, or all; by default what suits each backend.",
)
@click.option(
    "--scope",
    "scopes",
    callback=_names,
    metavar="A,B",
    default="device,host,image_to_label",
    show_default=True,
    help="device: by the GPU's own clock (ONNX Runtime's with each launch); host: pixels in, "
    "outputs out; image_to_label: encoded image to prediction.",
)
@click.option(
    "--concurrency",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Callers at once, each in a thread of its own.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="That a backend on the CPU computes with; by default as many as it may use.",
)
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    callback=_finite,  # the range lets nan and inf through
    help="Of measuring, for each row.",
)
@click.option(
    "--images",
    type=PathInHome(exists=True, file_okay=False),
    help="Photos to measure with; by default JPEGs of 500x375 made from a seed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows on stdout.")
@click.option("--plot", type=PathInHome(dir_okay=False), help="Draw the rows as a PNG.")
@click.option(
    "--compare",
    type=PathInHome(),
    help="JSON of an earlier run: exit with 1 if one of its rows became slower, or is missing.",
)
@click.version_option(__version__, prog_name="capt")
def main(
    bundle: Path,
    backends: tuple[str, ...],
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    scopes: tuple[str, ...],
    concurrency: int,
    threads: int | None,
    seconds: float,
    images: Path | None,
    as_json: bool,
    plot: Path | None,
    compare: Path | None,
) -> None:
    """Measure latency and throughput of a BUNDLE, backends side by side.

    Everything is warmed up until stable and measured in turns, so that what changes meanwhile
    changes all rows alike. Latencies are of one call with a whole batch.

    --compare: a row became slower if its median grew by more than 10 %, and by more than three
    standard errors, found from how the medians of its turns differ in both runs. Where three of
    them are more than 50 %, "unclear" is said of a row that did not. A row that this run was asked
    for and does not have is missing. Both end with exit code 1.

    \b
    Example:
      capt-bench pets.capt --backend all --batch 1,32
      capt-bench pets.capt --json > before.json
      capt-bench pets.capt --compare before.json --plot latency.png
    """
    from capt_deploy.bench.cases import Wanted, bench
    from capt_deploy.bench.compare import compare_rows, load_rows
    from capt_deploy.bench.measure import SCOPES, BenchOptions

    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise click.UsageError(f"--scope: expected of {', '.join(SCOPES)}, came {unknown[0]}")
    old = None if compare is None else load_rows(compare)
    if plot is not None:
        from capt_deploy.bench.plot import check_plotting, plot_rows

        check_plotting()
    wanted = Wanted(backends, precisions, batches, scopes, concurrency, threads)
    rows = bench(bundle, wanted, _photos(images), BenchOptions(seconds=seconds), say)
    if as_json:
        print_json(rows)
    else:
        _print_table(rows)
    if plot is not None:
        plot_rows(plot, rows)
        say(f"drew {plot}")
    if old is not None:
        comparison = compare_rows(old, rows, wanted)
        click.echo(f"\n{comparison}" if not as_json else str(comparison), err=as_json)
        if comparison.failed:
            sys.exit(1)


def _photos(folder: Path | None) -> "Photos":
    from capt_deploy.bench.cases import Photos
    from capt_deploy.bench.images import SIZE, folder_photos, synthetic_photos

    if folder is None:
        return Photos(synthetic_photos(32), f"synthetic {SIZE[0]}x{SIZE[1]}")
    encoded = folder_photos(folder)
    return Photos(encoded, f"{len(encoded)} of {folder}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from capt_deploy.bench.statistics import ENOUGH_FOR_P99

    header = (
        *("backend", "device", "precision", "scope", "batch", "callers"),
        *("p50 ms", "p90 ms", "p95 ms", "p99 ms", "mean ms", "CV", "images/s", "runs", "MB"),
    )
    click.echo(table(header, [_cells(row) for row in rows]))
    if any(row["iterations"] < ENOUGH_FOR_P99 for row in rows):
        say(
            f"*: fewer than {ENOUGH_FOR_P99} runs, so p99 lies beside the slowest of them; "
            "--seconds gives more"
        )
    if len({row["queued"] for row in rows} - {None}) > 1:
        say(
            "device: TensorRT's runs are queued, ONNX Runtime's are launched one by one, and their "
            "launch is in the time"
        )
    if restless := sum(not row["settled"] for row in rows):
        say(f"!: did not settle while warming up ({restless} rows); is the machine busy?")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from capt_deploy.bench.statistics import ENOUGH_FOR_P99

    memory = row["memory_bytes"]
    star = "*" if row["iterations"] < ENOUGH_FOR_P99 else ""
    return (
        *(row["backend"], row["device"], row["precision"], row["scope"], str(row["batch"])),
        str(row["concurrency"]),
        f"{row['p50_ms']:.3f}" + ("" if row["settled"] else "!"),
        *(f"{row[key]:.3f}" for key in ("p90_ms", "p95_ms")),
        f"{row['p99_ms']:.3f}{star}",
        f"{row['mean_ms']:.3f}",
        f"{100 * row['cv']:.1f} %",
        f"{row['throughput_per_s']:.1f}",
        str(row["iterations"]),
        "" if memory is None else f"{memory / 1e6:.0f}",
    )
