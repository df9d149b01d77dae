"""Figures of a comparison: accuracy over shots, and calibration errors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from capt_train.compare.plan import Plan
from capt_train.compare.run import Lines
from capt_train.compare.tables import main_accuracy, select

_MARKS = "osD^v<>PX*"
_Cells = Sequence[Mapping[str, Any]]


def draw(folder: Path, plan: Plan, cells: Lines) -> list[str]:
    """Draw two figures for each data set into a folder and return their names.

    Each row of a figure is a method; marks stand for numbers of shots, or for calibrations.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for data in plan.data:
        for kind, plot in (("shots", _accuracies), ("ece", _errors)):
            groups = {row: select(cells, data=data, row=row) for row in plan.rows}
            groups = {row: group for row, group in groups.items() if group}
            height = 2 + 0.22 * len(groups)  # inches, for a line of text each
            figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
            if groups:
                plot(axes, plan, groups)
                axes.set_title(data)
                names.append(f"{data}-{kind}.png")
                figure.savefig(folder / names[-1], dpi=120)
            pyplot.close(figure)
    return names


def _accuracies(axes: Any, plan: Plan, groups: Mapping[str, _Cells]) -> None:
    """Mark the accuracy of each row with each number of shots; a line is the range of seeds."""
    for shots in dict.fromkeys(cell.config.shots for cell in plan.cells):

        def value(cell: Mapping[str, Any], shots: int | None = shots) -> float | None:
            return main_accuracy(cell) if cell["shots"] == shots else None

        _mark(axes, groups, value, "all" if shots is None else str(shots))
    axes.set_xlabel("accuracy, %; the harmonic mean of tuned and new classes where both are")
    axes.legend(title="photos of\neach class", loc="center left", bbox_to_anchor=(1, 0.5))


def _errors(axes: Any, plan: Plan, groups: Mapping[str, _Cells]) -> None:
    """Mark the ECE of each row with the most shots, under each calibration."""
    counts = [cell["shots"] for group in groups.values() for cell in group]
    most = None if None in counts else max(counts)
    for name in plan.calibrations:

        def value(cell: Mapping[str, Any], name: str = name) -> float | None:
            error: float | None = (cell["ece"].get(name) or {}).get("all")
            return error if cell["shots"] == most else None

        _mark(axes, groups, value, name)
    axes.set_xlabel(f"ECE among all classes, 15 bins, {most or 'all'} photos of each class, %")
    axes.legend(title="calibration", loc="center left", bbox_to_anchor=(1, 0.5))


def _mark(
    axes: Any,
    groups: Mapping[str, _Cells],
    value: Callable[[Mapping[str, Any]], float | None],
    label: str,
) -> None:
    """Draw one mark in each row: the mean of the values that there are."""
    points, low, high = [], [], []
    for height, group in enumerate(groups.values()):
        known = [100 * v for v in map(value, group) if v is not None]
        if known:
            points.append((fmean(known), height))
            low.append(fmean(known) - min(known))
            high.append(max(known) - fmean(known))
    if points:
        x, y = zip(*points, strict=True)
        mark = _MARKS[len(axes.containers) % len(_MARKS)]
        axes.errorbar(x, y, xerr=(low, high), fmt=mark, ms=5, lw=1, alpha=0.8, label=label)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", lw=0.3)
