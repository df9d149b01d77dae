"""The notebook runs from top to bottom, and shows what it promises."""

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
SECONDS = 300  # a cell; it takes seconds on a machine that has nothing else to do


@pytest.fixture(scope="module")
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook: Any) -> None:
    assert NOTEBOOK.stat().st_size < 20_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_it_runs_from_top_to_bottom(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # not in a home that may be read-only
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # As Jupyter does: in the notebook's own folder.
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    run = nbclient.NotebookClient(notebook, timeout=SECONDS, resources=where).execute()
    outputs = [output for cell in run.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "36 classes" in printed
    assert len(re.findall(r"^[a-z ]+: [a-z ]+ [01]\.\d{3}$", printed, re.MULTILINE)) == 6
    table = re.search(r"zero-shot +([\d.]+) +.*\ntuned +([\d.]+) ", printed)
    assert table
    assert float(table[2]) > float(table[1]), "tuning gains on its base classes"
    assert any("image/png" in output.get("data", {}) for output in outputs)
