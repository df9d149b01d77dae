"""Figures of a comparison: accuracy over shots, and calibration errors."""

from pathlib import Path
from statistics import fmean
from typing import Any

from capt_train.compare.plan import Plan
from capt_train.compare.run import Lines
from capt_train.compare.tables import main_accuracy, select

_MARKS = "osD^v<>PX*"


def draw(folder: Path, plan: Plan, cells: Lines) -> list[str]:
    """Draw two figures for each data set into a folder and return their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for data in plan.data:
        for kind, plot in (("shots", _over_shots), ("ece", _errors)):
            figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
            if plot(axes, plan, cells, data):
                axes.set_title(data)
                names.append(f"{data}-{kind}.png")
                figure.savefig(folder / names[-1], dpi=120)
            pyplot.close(figure)
    return names


def _over_shots(axes: Any, plan: Plan, cells: Lines, data: str) -> bool:
    """Draw the accuracy of each row over the number of shots, with the range of its seeds."""
    counts = sorted({cell.config.shots for cell in plan.cells if cell.config.shots is not None})
    if len(counts) < 2:
        return False
    for place, row in enumerate(plan.rows):
        groups = [(count, select(cells, data=data, row=row, shots=count)) for count in counts]
        groups = [(count, group) for count, group in groups if group]
        if not groups:
            continue
        values = [[100 * main_accuracy(cell) for cell in group] for _, group in groups]
        middle = [fmean(group) for group in values]
        ranges = [
            [m - min(group) for m, group in zip(middle, values, strict=True)],
            [max(group) - m for m, group in zip(middle, values, strict=True)],
        ]
        mark = _MARKS[place % len(_MARKS)]
        style = "--" if "+" in row else "-"
        axes.errorbar(
            [count for count, _ in groups], middle, ranges, marker=mark, ls=style, lw=1, label=row
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("photos of each class")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _errors(axes: Any, plan: Plan, cells: Lines, data: str) -> bool:
    """Draw the ECE of each row with the most shots, one bar for each calibration."""
    counts = [cell.config.shots for cell in plan.cells if cell.data == data]
    most = None if None in counts else max(count for count in counts if count is not None)
    rows = [row for row in plan.rows if select(cells, data=data, row=row, shots=most)]
    for place, name in enumerate(plan.calibrations):
        values = []
        for row in rows:
            errors = [
                cell["ece"].get(name) or {}
                for cell in select(cells, data=data, row=row, shots=most)
            ]
            known = [error["all"] for error in errors if error.get("all") is not None]
            values.append(100 * fmean(known) if known else float("nan"))
        height = 0.8 / len(plan.calibrations)
        places = [number + place * height for number in range(len(rows))]
        axes.barh(places, values, height, label=name, hatch=["", "//", "..", "xx", "--"][place % 5])
    axes.set_yticks([number + 0.4 for number in range(len(rows))], rows, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("ECE among all classes, 15 bins, %")
    axes.legend(title="calibration")
    return bool(rows)
