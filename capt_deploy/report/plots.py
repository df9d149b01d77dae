"""The pictures of a report as SVG; the only file of it that imports matplotlib.

All are readable in black and white: lines differ by dashes and markers. Text stays text, so that
the reader's own fonts show letters that matplotlib's lack. Sizes are in inches.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from capt_deploy.core.text import shortened
from capt_deploy.metrics.intervals import wilson
from capt_deploy.metrics.probabilities import Floats
from capt_deploy.metrics.reliability import Reliability
from capt_deploy.report.measure import FEW, ZERO_SHOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 9  # points of text, 12 pixels of a page
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "capt",  # the same data give the same file
    "font.size": _SIZE,
    "axes.labelsize": _SIZE,
    "axes.titlesize": _SIZE,
    "xtick.labelsize": _SIZE - 1,
    "ytick.labelsize": _SIZE - 1,
    "legend.fontsize": _SIZE - 1,
    "lines.markersize": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LINES: tuple[dict[str, Any], ...] = (
    {"linestyle": "--", "marker": "s", "color": "0.35", "markerfacecolor": "white"},
    {"linestyle": "-", "marker": "o", "color": "black"},
    {"linestyle": ":", "marker": "^", "color": "black", "markerfacecolor": "white"},
    {"linestyle": "-.", "marker": "D", "color": "0.5"},
    {"linestyle": (0, (5, 1, 1, 1)), "marker": "v", "color": "0.2", "markerfacecolor": "white"},
    {"linestyle": (0, (1, 2)), "marker": "P", "color": "0.35"},
)

_SMALL_MARKS: dict[str, Any] = {"linestyle": "none", "markersize": 2.5, "clip_on": False}

_LONGEST = 28  # characters of a name


@contextmanager
def _figure(width: float, height: float, svg: BytesIO) -> Iterator["Figure"]:
    """Yield a figure and write it; the user's own settings of matplotlib do not touch it."""
    from matplotlib import style
    from matplotlib.figure import Figure  # pyplot would keep the figure and look for a display

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has more letters
        figure = Figure(figsize=(width, height))
        yield figure
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})


def draw_reliability(before: Reliability, after: Reliability) -> bytes:
    """Draw accuracy over confidence, and below how many images have which confidence.

    Whiskers are 95 % Wilson intervals of the accuracy of a bin. Bins with few images get small
    marks, and no line that would lead the eye to them.
    """
    svg = BytesIO()
    with _figure(3.5, 3.9, svg) as figure:
        above, below = figure.subplots(
            2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw={"hspace": 0.09}
        )
        figure.subplots_adjust(left=0.15, right=0.97, top=0.93, bottom=0.11)
        for label, bins, look in zip(("before", "after"), (before, after), _LINES, strict=False):
            many, few = bins.counts >= FEW, (bins.counts > 0) & (bins.counts < FEW)
            above.plot(bins.confidence[many], bins.accuracy[many], label=label, **look)
            above.plot(bins.confidence[few], bins.accuracy[few], **{**look, **_SMALL_MARKS})
        above.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="ideal", zorder=0)
        full = after.counts > 0
        low, high = wilson(after.accuracy[full], after.counts[full])
        above.vlines(after.confidence[full], low, high, color="0.45", linewidth=1, zorder=1)
        above.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that is right")
        above.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncols=3, frameon=False)
        below.stairs(after.counts, after.edges, fill=True, color="0.75")
        below.stairs(after.counts, after.edges, color="black", linewidth=0.8)
        below.stairs(before.counts, before.edges, color="0.35", linestyle="--", linewidth=1.2)
        below.set(xlabel="confidence", ylabel="photos")
        _whole_numbers(below)
    return svg.getvalue()


def _whole_numbers(panel: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def draw_risks(curves: Mapping[str, tuple[Floats, Floats]], areas: Mapping[str, float]) -> bytes:
    """Draw the share that is wrong over the share of most confident images, a line a model.

    Args:
        curves: by model: coverage, risk.
        areas: under them.
    """
    from matplotlib.ticker import FuncFormatter

    svg, first = BytesIO(), 0 if ZERO_SHOT in curves else 1  # each looks as in other reports
    with _figure(3.5, 3.1 + 0.16 * len(curves), svg) as figure:
        panel = figure.subplots()
        legend = (0.16 * len(curves) + 0.08) / figure.get_figheight()
        figure.subplots_adjust(left=0.15, right=0.96, top=0.97 - legend, bottom=0.45 / 3.6)
        for number, (name, (coverage, risk)) in enumerate(curves.items()):
            look = _LINES[(first + number) % len(_LINES)]
            step = max(1, len(coverage) // 8)
            label = f"{areas[name]:.3f} {shortened(name, _LONGEST)}"
            marks = (number * step // max(1, len(curves)), step)
            panel.plot(coverage, risk, label=label, markevery=marks, **look)
        panel.set(xlim=(0, 1), xlabel="share of photos answered")
        panel.set_ylim(0, max(0.01, 1.05 * max(risk.max() for _, risk in curves.values())))
        panel.set_ylabel("wrong among these, %")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        panel.grid(color="0.9", linewidth=0.6)
        legend_box = panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False)
        for text in legend_box.get_texts():
            text.set_parse_math(False)
    return svg.getvalue()
