"""The report as Markdown: its tables, without pictures."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from capt_deploy.report.contents import Contents
from capt_deploy.report.data import ReportData
from capt_deploy.report.texts import (
    SCOPE_NAMES,
    class_table,
    flattened,
    headline,
    headline_caption,
    notes,
    pair_table,
    promise_table,
    recovery,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")


def markdown(data: ReportData, contents: Contents) -> str:
    """Return headline, pairs, classes and provenance."""
    columns, models = headline(contents)
    header = [
        "model",
        *(f"{part.title}: {SCOPE_NAMES[scope]}" for part in columns for scope in part.scopes),
    ]
    rows = [
        [name, *(f"{cell.text} ({cell.beneath})" if cell.beneath else cell.text for cell in cells)]
        for name, cells in models
    ]
    said = [f"> {plain(text)}" for text in notes(data, contents)]
    found = recovery(contents)
    parts = [
        f"# {plain(data.title)}",
        *said,
        _table(header, rows),
        plain(headline_caption(contents)),
        *([] if found is None else [plain(found)]),
        *(["## Sets and rejection", _table(*promise_table(contents))] if contents.promises else []),
        "## Most confused pairs",
        _table(*pair_table(contents)) if contents.pairs else "None.",
        "## Classes",
        _table(*class_table(contents)),
        "## Provenance",
        _table(["what", "value"], flattened(data.provenance)),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(text if text == "---" else plain(text) for text in line) + " |"
        for line in lines
    )
