"""Tables of a comparison, as Markdown, HTML and LaTeX."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from capt_train.compare.plan import Plan
from capt_train.compare.run import Lines

SCOPES = {"base": "tuned", "new": "new", "harmonic": "harmonic", "all": "all"}
_SIGNIFICANT = 0.05
_LATEX = str.maketrans(
    {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "--", "†": r"$\dagger$"}
)
_DAGGER = " †"
_TRANSDUCTIVE = "† transductive: test images were among its photos without labels."
_Cell = Mapping[str, Any]
_Value = Callable[[_Cell], float | None]


@dataclass(frozen=True)
class Table:
    """A table with a title; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(plan: Plan, cells: Lines) -> list[Table]:
    """Return the average over all data sets, then a table for each data set and number of shots."""
    counts = [*dict.fromkeys(cell.config.shots for cell in plan.cells)]
    result = [_average(plan, cells, shots) for shots in counts] if len(plan.data) > 1 else []
    result += [
        _of_data(plan, cells, data, shots, targets)
        for data in plan.data
        for shots in counts
        for targets in [sorted({t for c in plan.cells if c.data == data for t in c.targets})]
    ]
    return [table for table in result if table.rows]


def select(cells: Lines, **values: Any) -> list[_Cell]:
    """Return the cells with these values."""
    return [c for c in cells.values() if all(c[key] == value for key, value in values.items())]


def main_accuracy(cell: _Cell) -> float:
    """Return the harmonic mean of tuned and new classes; where all are tuned, their accuracy."""
    return float(cell["all"] if cell["harmonic"] is None else cell["harmonic"])


def percent(values: Iterable[float | None]) -> str:
    """Return the mean ± standard deviation of shares, in %."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


def _of_data(
    plan: Plan, cells: Lines, data: str, shots: int | None, targets: Sequence[str]
) -> Table:
    shown = select(cells, data=data, shots=shots)
    scopes = [scope for scope in SCOPES if any(cell[scope] is not None for cell in shown)]
    if "new" not in scopes:
        scopes = ["all"]
    measured = [scope for scope in scopes if scope != "harmonic"]
    header = ["", *(SCOPES[scope] for scope in scopes)]
    header += [f"ECE {name}, {SCOPES[s]}" for name in plan.calibrations for s in measured]
    header += [part for target in targets for part in (target, f"ECE {target}")]
    rows = []
    for row in plan.rows:
        if not (row_cells := select(cells, data=data, shots=shots, row=row)):
            continue
        texts = [percent(cell[scope] for cell in row_cells) for scope in scopes]
        texts += [
            percent(cell["ece"].get(name, {}).get(scope) for cell in row_cells)
            for name in plan.calibrations
            for scope in measured
        ]
        for target in targets:
            elsewhere = [cell["targets"].get(target) or {} for cell in row_cells]
            texts += [percent(figures.get(key) for figures in elsewhere) for key in ("all", "ece")]
        seeds = "" if len(row_cells) > 1 else " (1 seed)"
        rows.append((f"{row}{_mark(row_cells)}{seeds}", *texts))
    note = _TRANSDUCTIVE if any(cell["transductive"] for cell in shown) else ""
    return Table(f"{data}, {_shots(shots)}", tuple(header), tuple(rows), note)


def _average(plan: Plan, cells: Lines, shots: int | None) -> Table:
    """Return mean accuracy and its difference from the reference, over data sets."""
    reference = _means(select(cells, shots=shots, row=plan.reference))
    header = ["", "accuracy", *(f"ECE {name}" for name in plan.calibrations), "data sets"]
    if plan.reference is not None:
        header += [f"difference from {plan.reference}", "p"]
    rows = []
    for row in plan.rows:
        if not (row_cells := select(cells, shots=shots, row=row)):
            continue
        by_data = [select(cells, shots=shots, row=row, data=data) for data in plan.data]
        by_data = [group for group in by_data if group]

        def mean(value: _Value, groups: list[list[_Cell]] = by_data) -> str:
            known = [[v for v in map(value, group) if v is not None] for group in groups]
            means = [fmean(values) for values in known if values]
            return f"{100 * fmean(means):.1f}" if means else "–"

        texts = [mean(main_accuracy), *(mean(partial(_error, name)) for name in plan.calibrations)]
        texts.append(str(len(by_data)))
        if plan.reference is not None:
            means = _means(row_cells)
            pairs = [(means[data], reference[data]) for data in means if data in reference]
            texts += _difference(pairs, is_reference=row == plan.reference)
        rows.append((row + _mark(row_cells), *texts))
    note = (
        "Accuracy: the harmonic mean of tuned and new classes, or that of all classes where all "
        "are tuned; a mean over data sets. ECE likewise: the mean of tuned and new classes, or all."
    )
    if plan.reference is not None:
        note += " p: paired t-test over data sets, seeds averaged before; * below 0.05."
    if any(row[0].endswith(_DAGGER) for row in rows):
        note += f" {_TRANSDUCTIVE}"
    return Table(f"Mean of the data sets, {_shots(shots)}", tuple(header), tuple(rows), note)


def _means(cells: Sequence[_Cell]) -> dict[str, float]:
    """Return the mean accuracy of each data set."""
    by_data: dict[str, list[float]] = {}
    for cell in cells:
        by_data.setdefault(cell["data"], []).append(main_accuracy(cell))
    return {data: fmean(values) for data, values in by_data.items()}


def _mark(cells: Sequence[_Cell]) -> str:
    return _DAGGER if any(cell["transductive"] for cell in cells) else ""


def _error(name: str, cell: _Cell) -> float | None:
    errors: Mapping[str, float | None] = cell["ece"].get(name) or {}
    base, new = errors.get("base"), errors.get("new")
    return errors.get("all") if base is None or new is None else fmean((base, new))


def _difference(pairs: list[tuple[float, float]], *, is_reference: bool) -> list[str]:
    """Return the mean difference in points and the p of a paired t-test."""
    if not pairs or is_reference:
        return ["–", "–"]
    difference = f"{100 * fmean(a - b for a, b in pairs):+.1f}"
    p = paired_p(pairs)
    if p is None:
        return [difference, "–"]
    return [difference + ("*" if p < _SIGNIFICANT else ""), f"{p:.3f}"]


def paired_p(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return p of a paired two-sided t-test; None with fewer than three pairs or no difference."""
    from scipy.stats import ttest_rel

    if len(pairs) < 3 or len({a - b for a, b in pairs}) == 1:
        return None
    first, second = zip(*pairs, strict=True)
    return float(ttest_rel(first, second).pvalue)


def _shots(shots: int | None) -> str:
    return "all photos" if shots is None else f"{shots} {'shots' if shots > 1 else 'shot'}"


def to_markdown(shown: Sequence[Table], level: int = 3) -> str:
    """Return the tables as Markdown."""
    parts = []
    for table in shown:
        lines = [f"{'#' * level} {table.title}", "", "| " + " | ".join(table.header) + " |"]
        lines.append("|---" * len(table.header) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        parts.append("\n".join([*lines, *(["", table.note] if table.note else [])]))
    return "\n\n".join(parts)


def to_html(shown: Sequence[Table], images: Sequence[str] = ()) -> str:
    """Return a page with the tables, and figures by file name."""
    body = []
    for table in shown:
        cells = [
            "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
            for tag, rows in (("th", [table.header]), ("td", table.rows))
            for row in rows
        ]
        rows = "\n".join(f"<tr>{row}</tr>" for row in cells)
        note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
        body.append(f"<h2>{html.escape(table.title)}</h2>\n<table>\n{rows}\n</table>\n{note}")
    body += [f'<img src="{html.escape(name)}" alt="{html.escape(name)}">' for name in images]
    style = (
        "body{font:15px system-ui;margin:2em;max-width:80em}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child{text-align:left}img{max-width:100%}"
    )
    head = f'<meta charset="utf-8"><title>capt-compare</title><style>{style}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def to_latex(shown: Sequence[Table]) -> str:
    """Return the tables for LaTeX with the package booktabs."""
    parts = []
    for table in shown:
        columns = "l" + "r" * (len(table.header) - 1)
        rows = [" & ".join(text.translate(_LATEX) for text in row) + r" \\" for row in table.rows]
        header = " & ".join(text.translate(_LATEX) for text in table.header) + r" \\"
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{table.title.translate(_LATEX)}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    header,
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    *(
                        [r"\\[1ex] \footnotesize " + table.note.translate(_LATEX)]
                        if table.note
                        else []
                    ),
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"
