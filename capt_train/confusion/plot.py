"""The confusion matrices before and after tuning as a picture (METHOD 2)."""

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

_NUMBERED = 20  # more classes than this leave no room for numbers in the cells
_LABELLED = 60  # nor for names beside them
_WORST = 12
MOST_DRAWN = 1000  # classes; a cell of more would be smaller than a pixel
_LONGEST = 32  # characters of a name
_DPI = 120


def plot_confusions(
    path: Path,
    counts: Float[NDArray[np.floating], "2 classes classes"],
    class_names: Sequence[str],
    of_classes: int | None = None,
) -> None:
    """Draw confusion counts before and after tuning side by side as a PNG, atomically.

    Up to 60 classes are all named; with more, the worst pairs are ringed and listed instead.

    Args:
        path: of the PNG.
        counts: before and after tuning, `[true, predicted]`, zero diagonals.
        class_names: one per row and column.
        of_classes: their number where these are only the most confused.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # pyplot would keep the figure and look for a display
    from matplotlib.ticker import MaxNLocator

    names = [shortened(name, _LONGEST) for name in class_names]
    named = len(names) <= _LABELLED
    side = min(max(3.2, 0.19 * len(names)), 9.6)  # inches, as all below
    margin = 1.0 + (0.075 * max(map(len, names)) if named else 0.0)
    size = (margin + 2 * (side + 0.3) + 1.2, (margin if named else 2.0) + side + 0.8)
    figure = Figure(figsize=size, dpi=_DPI, layout="compressed")
    panels = figure.subplots(1, 2).tolist()
    norm = PowerNorm(0.5, 0, max(1.0, float(counts.max())))  # a root, to keep single images visible
    for panel, title, matrix in zip(panels, ("before", "after"), counts, strict=True):
        image = panel.imshow(matrix, cmap="Blues", norm=norm, interpolation="nearest")
        panel.set_title(f"{title} tuning: {_number(float(matrix.sum()))} images", fontsize=10)
        _frame(panel, names if named else [], len(names))
        if len(names) <= _NUMBERED:
            for true, predicted in np.argwhere(matrix).tolist():
                count = float(matrix[true, predicted])
                colour = "white" if norm(count) > 0.6 else "black"
                style = {"ha": "center", "va": "center", "color": colour, "size": 7}
                panel.text(predicted, true, _number(count), **style)
    panels[0].set_ylabel("true class")
    panels[1].tick_params(axis="y", labelleft=False)
    title = "Training images taken for another class (views that were not tuned on)"
    if of_classes is not None and of_classes > len(names):
        title += f"\nThe {len(names):,} most confused of {of_classes:,} classes"
    figure.suptitle(title)
    bar = figure.colorbar(image, ax=panels, label="images", shrink=0.8, pad=0.02)
    bar.locator = MaxNLocator(integer=True)
    if not named:
        lines = _ring_worst(panels, counts, names)
        figure.supxlabel(lines, x=0.02, ha="left", fontsize=10, parse_math=False)
    png = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks become boxes
        figure.savefig(png, format="png", bbox_inches="tight")
    write_bytes(path, png.getvalue())


def _frame(panel: "Axes", names: Sequence[str], classes: int) -> None:
    """Draw diagonal and axes, with names and a grid where there are names."""
    ends = (-0.5, classes - 0.5)
    panel.plot(ends, ends, color="0.75", linewidth=0.8)
    panel.set(xlim=ends, ylim=ends[::-1], xlabel="taken for")
    size = 8 if classes <= _NUMBERED else 7
    panel.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    panel.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    if names:
        lines = np.arange(classes - 1) + 0.5
        panel.set_xticks(lines, minor=True)
        panel.set_yticks(lines, minor=True)
        panel.grid(which="minor", color="0.92", linewidth=0.4)
        panel.tick_params(which="minor", length=0)


def _ring_worst(
    panels: Sequence["Axes"],
    counts: Float[NDArray[np.floating], "2 classes classes"],
    names: Sequence[str],
) -> str:
    """Number the worst pairs in both panels; return their names and counts, one a line."""
    highest = counts.max(axis=0)
    worst = np.argsort(-highest, axis=None, kind="stable")[:_WORST]
    cells = [divmod(cell, len(names)) for cell in worst.tolist() if highest.flat[cell]]
    lines = []
    for number, (true, predicted) in enumerate(cells, start=1):
        for panel in panels:
            panel.plot(predicted, true, "o", markersize=8, fillstyle="none", color="black")
            place = (predicted, true)
            panel.annotate(str(number), place, (5, 3), textcoords="offset points", size=9)
        shown = " → ".join(_number(float(count)) for count in counts[:, true, predicted])
        lines.append(f"{number}  {names[true]} taken for {names[predicted]}: {shown}")
    return "\n".join(lines)


def _number(count: float) -> str:
    return f"{round(count, 1):.10g}"
