"""The command `capt-bench`."""

import math
import sys
from pathlib import Path
from typing import Any

import click

from capt_deploy.backends.spec import backend_names
from capt_deploy.core.console import Command, PathInHome, counted, print_json, say, table
from capt_deploy.core.version import __version__


def _names(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return comma-separated names, each once; none where the option is missing."""
    if value is None:
        return ()
    names = tuple(dict.fromkeys(filter(None, map(str.strip, value.split(",")))))
    if not names:
        raise click.BadParameter("expected at least one")
    return names


def _numbers(ctx: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    names = _names(ctx, option, value)
    if wrong := [name for name in names if not name.isdecimal() or int(name) < 1]:
        raise click.BadParameter(f"expected whole numbers from 1 on, came {wrong[0]}")
    return tuple(map(int, names))


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
    help=f"Some of {', '.join(backend_names())}; or all, or gpu: those that work here.",
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
    help="Threads that call at once.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Cores for a backend on the CPU; by default all that it may use.",
)
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    callback=_finite,  # the range lets nan and inf through
    help="Measuring time for each row.",
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
    help="JSON of an earlier run: exit with 1 if one of its rows became slower or is missing.",
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

    All rows are warmed up until they are stable and measured in turns, so that changes of the
    machine affect all alike. Latencies are of one call with a whole batch.

    --compare: a row is slower if its median grew by more than 10 % and by more than three standard
    errors, estimated from the medians of its turns in both runs. A row with three standard errors
    above 50 % that is not slower is "unclear". A row of the earlier run that this run should have,
    but lacks, is missing. With a slower or missing row the exit code is 1.

    \b
    Example:
      capt-bench pets.capt --backend all --batch 1,32
      capt-bench pets.capt --json > before.json
      capt-bench pets.capt --compare before.json --plot latency.png
    """
    from capt_deploy.bench.cases import BenchRequest, bench
    from capt_deploy.bench.compare import compare_rows, load_rows
    from capt_deploy.bench.images import folder_photos, synthetic_photos
    from capt_deploy.bench.measure import SCOPES, BenchOptions

    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise click.UsageError(f"--scope: expected of {', '.join(SCOPES)}, came {unknown[0]}")
    old = None if compare is None else load_rows(compare)
    if plot is not None:
        from capt_deploy.bench.plot import plot_rows
        from capt_deploy.core.install import require_packages

        require_packages("--plot", "plot", "matplotlib")
    request = BenchRequest(backends, precisions, batches, scopes, concurrency, threads)
    photos = synthetic_photos(32) if images is None else folder_photos(images)
    rows = bench(bundle, request, photos, BenchOptions(seconds=seconds))
    if as_json:
        print_json(rows)
    else:
        _print_table(rows)
    if plot is not None:
        plot_rows(plot, rows)
        say(f"drew {plot}")
    if old is not None:
        comparison = compare_rows(old, rows, request)
        click.echo(f"{comparison}" if as_json else f"\n{comparison}", err=as_json)
        if comparison.failed:
            sys.exit(1)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from capt_deploy.bench.measure import ENOUGH_FOR_P99

    header = (
        *("backend", "device", "precision", "scope", "batch", "callers"),
        *("p50 ms", "p90 ms", "p95 ms", "p99 ms", "mean ms", "CV", "images/s", "runs", "MB"),
    )
    few = [row["iterations"] < ENOUGH_FOR_P99 for row in rows]
    cells = [
        (
            *(row["backend"], row["device"], row["precision"], row["scope"]),
            *(str(row["batch"]), str(row["concurrency"])),
            f"{row['p50_ms']:.3f}{'' if row['settled'] else '!'}",
            f"{row['p90_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['p99_ms']:.3f}{'*' if is_few else ''}",
            f"{row['mean_ms']:.3f}",
            f"{100 * row['cv']:.1f} %",
            f"{row['throughput_per_s']:.1f}",
            str(row["iterations"]),
            "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}",
        )
        for row, is_few in zip(rows, few, strict=True)
    ]
    click.echo(table(header, cells))
    if any(few):
        say(
            f"*: fewer than {ENOUGH_FOR_P99} runs, so p99 is about the slowest of them; raise "
            "--seconds for more runs"
        )
    if len({row["queued"] for row in rows} - {None}) > 1:
        say(
            "device: TensorRT's runs are queued; ONNX Runtime's are launched one by one, and their "
            "times include the launch"
        )
    if unsettled := sum(not row["settled"] for row in rows):
        say(f"!: {counted(unsettled, 'row')} not stable after warming up; is the machine busy?")
