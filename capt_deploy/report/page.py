"""The report as one HTML file that fetches nothing and runs nothing, and as Markdown."""

import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capt_deploy.core.console import counted
from capt_deploy.core.version import __version__
from capt_deploy.evaluation.summary import choice_notes, curve_notes, percent
from capt_deploy.report import plots, tables
from capt_deploy.report.advice import advice
from capt_deploy.report.confusions import count_confusions, order_by_confusion
from capt_deploy.report.measure import FEW
from capt_deploy.report.results import Results

if TYPE_CHECKING:
    from jinja2 import Environment

MADE_BY = "capt-eval report"  # marks a file as an earlier report
_FOLDER = Path(__file__).parent
_HTML, _MARKDOWN, _STYLE = "report.html.jinja", "report.md.jinja", "style.css"
MOST_CLASSES = 100  # of the confusion matrix
_NUMBERED = 20  # with more classes there is no room for numbers in its cells
_SHADES = 10
_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")


def render_html(results: Results) -> str:
    """Return the page."""
    css = (_FOLDER / _STYLE).read_text(encoding="utf-8")
    return (
        _environment()
        .get_template(_HTML)
        .render(
            **_texts(results),
            css=css,
            css_hash=b64encode(sha256(css.encode()).digest()).decode(),
            figures=_figures(results),
            confusions=_confusion_matrix(results),
        )
    )


def render_markdown(results: Results) -> str:
    """Return the page's tables and sentences, without pictures."""
    columns, rows = tables.headline(results)
    header = [f"{title}: {scope}" for title, scopes in columns.items() for scope in scopes]
    lines = [
        [name, *(f"{text} ({limits})" if limits else text for text, limits in cells)]
        for name, cells in rows.items()
    ]
    headline = tables.Table(["model", *header], lines)
    return _environment().get_template(_MARKDOWN).render(**_texts(results), headline=headline)


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def _markdown_table(table: tables.Table) -> str:
    lines = [[escape_markdown(text) for text in row] for row in (table.header, *table.rows)]
    lines.insert(1, ["---"] * len(table.header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: name == _HTML,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, counted=counted)
    environment.filters.update(plain=escape_markdown, table=_markdown_table)
    return environment


def _texts(results: Results) -> dict[str, Any]:
    """Return the variables that both templates show."""
    columns, rows = tables.headline(results)
    provenance = dict(results.evaluation.provenance)
    choice = provenance.pop("choice", None)
    curve = choice and choice.get("learning_curve")
    return {
        "made_by": f"{MADE_BY} {__version__}",
        "results": results,
        "main": results.main.name,
        "summary": tables.summary_line(results),
        "context": tables.context_line(results),
        "warnings": tables.warnings(results),
        "columns": columns,
        "rows": rows,
        "changes": tables.tuning_changes(results),
        "few": FEW,
        "promises": tables.promise_table(results),
        "pairs": tables.pair_table(results),
        "classes": tables.class_table(results),
        "classes_shown": tables.classes_shown(results),
        "choice": tables.choice_table(results),
        "choice_notes": choice_notes(choice) if choice else [],
        "curve": tables.curve_table(curve) if curve else None,
        "curve_notes": curve_notes(curve) if curve else [],
        "advice": advice(results),
        "provenance": tables.Table(("what", "value"), list(tables.flattened(provenance))),
    }


def _figures(results: Results) -> list[dict[str, str]]:
    """Return a reliability diagram for each scope, then a risk plot for each scope."""
    figures: list[dict[str, str]] = []
    scopes = list(results.main.after)

    def add(kind: str, name: str, scope: str, text: str, svg: bytes) -> None:
        text = (f", {scope} classes: " if len(scopes) > 1 else ": ") + text
        url = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
        figures.append({"kind": kind, "name": name, "text": text, "url": url})

    for model in filter(None, (results.zero_shot, results.main)):
        for scope in scopes:
            before = percent(model.report["uncalibrated"][scope]["ece_15"])
            after, chance = percent(model.report[scope]["ece_15"]), percent(model.chance[scope][0])
            text = f"ECE {after} % (before calibration {before} %, by chance {chance} %)"
            svg = plots.draw_reliability(model.before[scope], model.after[scope])
            add("Reliability", model.name, scope, text, svg)
    for scope in scopes:
        areas = {model.name: model.report[scope]["aurc"] for model in results.models}
        svg = plots.draw_risks({model.name: model.risks[scope] for model in results.models}, areas)
        add("Risk", "all models", scope, "mistakes among the photos answered", svg)
    return figures


def _confusion_matrix(results: Results) -> dict[str, Any] | None:
    """Return names and cells of the most confused classes; None without confusions."""
    if not results.pairs:
        return None
    counts, _ = count_confusions(results.predictions)
    order = order_by_confusion(counts, len(results.evaluation.class_names), MOST_CLASSES)
    # The shares are of all photos of a class, also of those taken for a class that is not shown.
    photos = np.bincount(results.predictions.labels, minlength=max(order) + 1)
    known = set(results.evaluation.pairs)

    def cell(true: int, taken: int) -> tuple[int, int, bool]:
        count = counts[true, taken]
        shade = ceil(_SHADES * sqrt(count / max(photos[true], 1)))  # so that single photos show
        return count, shade, count > 0 and (true, taken) in known

    cells = [[cell(true, taken) for taken in order] for true in order]
    names = [results.evaluation.class_names[column] for column in order]
    return {
        "names": names,
        "rows": list(zip(names, cells, strict=True)),
        "numbered": len(order) <= _NUMBERED,
        "framed": any(mined for row in cells for *_, mined in row),
    }
