"""What README and docs/confidence.md show is what was measured."""

import re
from pathlib import Path

import pytest

from benchmarks.confidence_tables import ece_table, rest_table, sets_table
from benchmarks.record import load_cells

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "confidence.md").read_text()
ROWS = {
    "CoOp + temperature": "CoOp + temperature",
    "capt, exported fp16": "capt, exported fp16",
    "chance": "chance alone, were capt perfectly calibrated",
}


def rows_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("table", [ece_table, sets_table, rest_table])
def test_the_tables_of_the_docs_are_taken_from_the_cells(table) -> None:
    assert table(load_cells("confidence")) in DOCS


def test_the_readme_shows_rows_of_them() -> None:
    shown = rows_of((ROOT / "README.md").read_text())
    measured = rows_of(ece_table(load_cells("confidence")))
    for row, name in ROWS.items():
        assert shown[row] == measured[name]
