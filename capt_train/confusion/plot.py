"""Draw who is mistaken for whom as a matrix (METHOD 2)."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from capt_deploy.core.files import write_bytes
from capt_deploy.core.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.ticker import MaxNLocator

_NUMBERED = 20  # more classes than this leave no room for numbers in the cells
_LABELLED = 60  # nor for names beside them
_WORST = 12
_LONGEST = 32  # characters of a name
_DPI = 120

_Matrix = Float[NDArray[np.floating], "classes classes"]


def plot_confusions(
    path: Path,
    before: Float[NDArray[np.floating], "classes classes"],
    after: Float[NDArray[np.floating], "classes classes"] | None,
    class_names: Sequence[str],
) -> None:
    """Draw confusion counts as a PNG, before and after tuning side by side, atomically.

    Up to 60 classes are all named; with more, the worst pairs are ringed and listed instead.

    Args:
        path: of the PNG.
        before: counts, `[true, predicted]`, zero diagonal.
        after: likewise after tuning; None draws one matrix alone.
        class_names: one per row and column.
    """
    from matplotlib.figure import Figure  # pyplot would keep the figure and look for a display

    shown = {"before tuning": before}
    if after is not None:
        shown["after tuning"] = after
    names = [shortened(name, _LONGEST) for name in class_names]
    side = min(max(3.2, 0.19 * len(names)), 9.6)  # inches, as all below
    room = 1.0 + 0.075 * max(map(len, names)) if len(names) <= _LABELLED else 1.0
    below = room if len(names) <= _LABELLED else 2.0
    size = (room + len(shown) * (side + 0.3) + 1.2, below + side + 0.8)
    figure = Figure(figsize=size, dpi=_DPI, layout="compressed")
    panels = figure.subplots(1, len(shown), squeeze=False)[0].tolist()
    highest = max(1.0, *(float(counts.max()) for counts in shown.values()))
    for panel, (title, counts) in zip(panels, shown.items(), strict=True):
        image = _draw(panel, counts, highest)
        panel.set_title(f"{title}: {_number(float(counts.sum()))} images", fontsize=10)
        _name(panel, names, rows=panel is panels[0])
    figure.suptitle("Training images taken for another class (views that were not tuned on)")
    bar = figure.colorbar(image, ax=panels, label="images", shrink=0.8, pad=0.02)
    bar.locator = _whole_numbers()
    if len(names) > _LABELLED:
        lines = _ring_worst(panels, list(shown.values()), names)
        figure.supxlabel(lines, x=0.02, ha="left", fontsize=10, parse_math=False)
    png = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks become boxes
        figure.savefig(png, format="png", bbox_inches="tight")
    write_bytes(path, png.getvalue())


def _draw(panel: "Axes", counts: _Matrix, highest: float) -> "AxesImage":
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, 0, highest)  # a root, so that single images do not fade away
    image = panel.imshow(counts, cmap="Blues", norm=norm, interpolation="nearest")
    ends = (-0.5, len(counts) - 0.5)
    panel.plot(ends, ends, color="0.75", linewidth=0.8)
    panel.set(xlim=ends, ylim=ends[::-1])
    if len(counts) <= _NUMBERED:
        for true, taken in np.argwhere(counts).tolist():
            count = float(counts[true, taken])
            colour = "white" if norm(count) > 0.6 else "black"
            panel.text(taken, true, _number(count), ha="center", va="center", color=colour, size=7)
    return image


def _name(panel: "Axes", names: Sequence[str], rows: bool) -> None:
    """Name columns, and in the first panel rows; too many names are left out."""
    panel.set_xlabel("taken for")
    labelled = names if len(names) <= _LABELLED else []
    ticks = range(len(labelled))
    size = 8 if len(names) <= _NUMBERED else 7
    panel.set_xticks(ticks, labelled, rotation=90, fontsize=size, parse_math=False)
    panel.set_yticks(ticks, labelled, fontsize=size, parse_math=False)
    panel.tick_params(axis="y", labelleft=rows)
    if rows:
        panel.set_ylabel("true class")
    if labelled:
        lines = np.arange(len(names) - 1) + 0.5
        panel.set_xticks(lines, minor=True)
        panel.set_yticks(lines, minor=True)
        panel.grid(which="minor", color="0.92", linewidth=0.4)
        panel.tick_params(which="minor", length=0)


def _ring_worst(panels: Sequence["Axes"], shown: Sequence[_Matrix], names: Sequence[str]) -> str:
    """Number the worst pairs in every panel; return who they are and how often."""
    highest = np.max(shown, axis=0)
    worst = np.argsort(-highest, axis=None, kind="stable")[:_WORST]
    cells = [divmod(cell, len(names)) for cell in worst.tolist() if highest.flat[cell]]
    lines = []
    for number, (true, taken) in enumerate(cells, start=1):
        for panel in panels:
            panel.plot(taken, true, "o", markersize=8, fillstyle="none", color="black")
            panel.annotate(str(number), (taken, true), (5, 3), textcoords="offset points", size=9)
        counts = " → ".join(_number(float(counts[true, taken])) for counts in shown)
        lines.append(f"{number}  {names[true]} taken for {names[taken]}: {counts}")
    return "\n".join(lines)


def _whole_numbers() -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _number(count: float) -> str:
    return f"{round(count, 1):.10g}"
