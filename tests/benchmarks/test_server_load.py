"""The load benchmark loads a real server, and the docs show its rows."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import record, server_load

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def test_the_docs_show_the_table_of_the_rows() -> None:
    cells = record.load_cells("server_load")
    assert server_load.markdown(cells) in server_load.DOCS.read_text()
    for cell in cells.values():
        assert {row["clients"] for row in cell["rows"]} >= {200}
        assert all(row["lost"] == row["wrong"] == 0 for row in cell["rows"])


def test_a_server_is_loaded_and_a_row_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        pytest.importorskip(name)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    bundle, photos = str(GOLDEN / "tiny.capt"), str(GOLDEN / "photos")
    command = [bundle, photos, "--name", "tiny", "--clients", "1,5", "--requests", "10"]
    done = CliRunner().invoke(server_load.main, command)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "server_load.json").read_text())["cells"]["tiny"]
    assert [(row["clients"], row["requests"]) for row in kept["rows"]] == [(1, 10), (5, 10)]
    for row in kept["rows"]:
        assert (row["lost"], row["wrong"]) == (0, 0)
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert kept["photos"] == 3
