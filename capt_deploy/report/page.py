"""The report as one HTML file that fetches nothing and runs nothing."""

from base64 import b64encode
from hashlib import sha256

from capt_deploy.core.version import __version__
from capt_deploy.report.contents import Contents
from capt_deploy.report.data import ReportData
from capt_deploy.report.markup import Markup, element, given, scroll, table
from capt_deploy.report.page_gallery import gallery_section
from capt_deploy.report.page_plots import confusion_section, reliability_section, risk_section
from capt_deploy.report.style import CSS
from capt_deploy.report.texts import (
    ACCURACY,
    CONFIDENCE,
    PROMISES,
    SCOPE_NAMES,
    ZERO_SHOT_ACCURACY,
    Cell,
    class_table,
    flattened,
    headline,
    headline_caption,
    notes,
    promise_table,
    recovery,
)

MADE_BY = "capt-eval report"  # by which an earlier report is known

_NUMBERS = {"images", ACCURACY, CONFIDENCE, ZERO_SHOT_ACCURACY}


def page(data: ReportData, contents: Contents) -> str:
    """Return the whole page."""
    sections = {
        "Headline": _headline(data, contents),
        "Reliability": reliability_section(contents),
        "Risk and coverage": risk_section(contents),
        **({"Sets and rejection": _promises(contents)} if contents.promises else {}),
        "Confusions": confusion_section(data, contents),
        "Gallery": gallery_section(contents),
        "Classes": _classes(contents),
        "Provenance": _provenance(data),
    }
    marks = {title: title.lower().replace(" ", "-") for title in sections}
    links = [element("li", element("a", title, href=f"#{marks[title]}")) for title in sections]
    body = element(
        "body",
        element("h1", given(data.title)),
        element("nav", element("ul", *links), aria_label="Contents"),
        element(
            "main",
            *(
                element("section", element("h2", title, id=marks[title]), *content)
                for title, content in sections.items()
            ),
        ),
    )
    return f'<!doctype html>\n<html lang="en">\n{_head(data.title)}\n{body}\n</html>\n'


def _head(title: str) -> Markup:
    own = b64encode(sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{own}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="generator", content=f"{MADE_BY} {__version__}"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(CSS)),
    )


def _headline(data: ReportData, contents: Contents) -> list[Markup]:
    columns, rows = headline(contents)
    above = [
        element("th", part.title, scope="colgroup", colspan=len(part.scopes), class_="first")
        for part in columns
    ]
    kinds = [
        "number" if place else "number first"
        for part in columns
        for place in range(len(part.scopes))
    ]
    scopes = [scope for part in columns for scope in part.scopes]
    below = [
        element("th", SCOPE_NAMES[scope], scope="col", class_=kind)
        for scope, kind in zip(scopes, kinds, strict=True)
    ]
    lines = [
        element(
            "tr",
            element("th", given(name), scope="row", class_="name"),
            *map(_cell, cells, kinds),
            class_="main" if name == contents.main.name else None,
        )
        for name, cells in rows
    ]
    head = element(
        "thead",
        element("tr", element("th", "model", scope="col", rowspan=2), *above),
        element("tr", *below),
    )
    caption = element("caption", headline_caption(contents))
    table = element("table", caption, head, element("tbody", *lines), class_="headline")
    said = [element("p", given(text), class_="warn") for text in notes(data, contents)]
    found = recovery(contents)
    return [
        *said,
        scroll("Headline", table),
        *([] if found is None else [element("p", found)]),
    ]


def _cell(cell: Cell, kind: str) -> Markup:
    return element("td", cell.text, element("small", cell.beneath), class_=kind)


def _promises(contents: Contents) -> list[Markup]:
    return [table(PROMISES, *promise_table(contents), set())]


def _classes(contents: Contents) -> list[Markup]:
    header, rows = class_table(contents)
    caption = "Every class that has images, among all classes; the least accurate first."
    return [table(caption, header, rows, _NUMBERS)]


def _provenance(data: ReportData) -> list[Markup]:
    caption = "Where these figures come from."
    return [table(caption, ["what", "value"], flattened(data.provenance), set())]
