"""What docs/confidence.md shows is what was measured."""

from pathlib import Path

import pytest

from benchmarks.confidence_tables import ece_table, rest_table, sets_table
from benchmarks.few_photos_tables import tables as few_photos_tables
from benchmarks.record import load_cells

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "confidence.md").read_text()


@pytest.mark.parametrize("table", [ece_table, sets_table, rest_table])
def test_the_tables_of_the_docs_are_taken_from_the_cells(table) -> None:
    assert table(load_cells("confidence")) in DOCS


def test_the_tables_of_runs_without_validation_photos_as_well() -> None:
    tables = few_photos_tables(load_cells("few_photos"))
    assert len(tables) == 7
    for table in tables.values():
        assert table in DOCS
