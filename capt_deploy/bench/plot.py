"""Draw the rows of `capt-bench`; matplotlib is imported only when it is used."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capt_deploy.core.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Series differ in shade, hatching and marker, so that they can be told apart without colours.
_SHADES = ("0.25", "0.65", "0.9", "0.45", "0.8")
_HATCHES = ("", "//", "..", "xx", "--", "oo", "\\\\")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 120

Row = Mapping[str, Any]


def plot_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw two panels for each scope as a PNG, atomically; readable in black and white.

    Above: the median latency of a batch, with a whisker to the 99th percentile. Below: throughput.
    """
    from matplotlib.figure import Figure  # pyplot would keep the figure and look for a display
    from matplotlib.patches import Patch

    scopes = list(dict.fromkeys(row["scope"] for row in rows))
    series = list(dict.fromkeys(map(_series, rows)))
    batches = sorted({row["batch"] for row in rows})
    width = max(4.5, 1.6 + 0.45 * len(series) * len(batches))  # inches
    size = (width * len(scopes), 7 + 0.25 * len(series))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = figure.subplots(2, len(scopes), squeeze=False)
    for (above, below), scope in zip(panels.T, scopes, strict=True):
        above.set_title(f"scope {scope}")
        for number, name in enumerate(series):
            group = [row for row in rows if row["scope"] == scope and _series(row) == name]
            shift = 0.8 * ((number + 0.5) / len(series) - 0.5)
            places = [batches.index(row["batch"]) + shift for row in group]
            _draw_latencies(above, places, group, number)
            throughputs = [row["throughput_per_s"] for row in group]
            bars = below.bar(places, throughputs, 0.8 / len(series), **_style(number))
            below.bar_label(bars, [_number(value) for value in throughputs], fontsize=8)
        for panel in (above, below):
            panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
            panel.set_xlim(-0.6, len(batches) - 0.4)
            panel.set_xlabel("batch size")
    panels[0, 0].set_ylabel("ms for a batch: median, whisker to p99")
    panels[1, 0].set_ylabel("images / s")
    handles = [Patch(label=name, **_style(number)) for number, name in enumerate(series)]
    figure.legend(handles=handles, loc="outside lower center", fontsize=9)
    png = BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def _series(row: Row) -> str:
    callers = row.get("concurrency", 1)
    suffix = f", {callers} callers" if callers > 1 else ""
    return f"{row['backend']}, {row['precision']}, {row['device']}{suffix}"


def _draw_latencies(
    panel: "Axes", places: Sequence[float], rows: Sequence[Row], number: int
) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    medians = [row["p50_ms"] for row in rows]
    panel.errorbar(
        places,
        medians,
        yerr=[[0.0] * len(rows), [max(0.0, row["p99_ms"] - row["p50_ms"]) for row in rows]],
        fmt=_MARKERS[number % len(_MARKERS)],
        color="black",
        markerfacecolor=_SHADES[number % len(_SHADES)],
        markersize=8,
        capsize=4,
    )
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(y=0.15)
    panel.grid(axis="y", which="both", color="0.9", linewidth=0.6)
    for place, value in zip(places, medians, strict=True):
        text, point = _number(value), (place, value)
        panel.annotate(text, point, (0, -15), textcoords="offset points", ha="center", size=8)


def _style(number: int) -> dict[str, Any]:
    """Return how the bars of a series look."""
    shade, hatch = _SHADES[number % len(_SHADES)], _HATCHES[number % len(_HATCHES)]
    return {"facecolor": shade, "hatch": hatch, "edgecolor": "black"}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
