"""What docs/export.md says of DAC is what was measured."""

from benchmarks import dac
from benchmarks.record import load_cells


def test_the_docs_show_what_was_measured() -> None:
    cells = load_cells(dac.NAME)
    assert len(cells) == 9
    assert dac.markdown(cells) in dac.DOCS.read_text()
