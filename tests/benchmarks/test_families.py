"""The table in the docs is what was found out, and what is found out is right for small models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import families, record
from capt_train.clip.loading import load_backbone

ROOT = Path(__file__).parents[2]
Family = Callable[[str], Path]


def test_the_docs_show_the_table_of_the_rows() -> None:
    rows = families.load()
    assert {*rows} == {*families.MODELS}
    assert families.markdown(rows) in (ROOT / "docs" / "families.md").read_text()


def test_rows_are_kept_and_written_into_the_docs(
    family_dir: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docs = tmp_path / "families.md"
    docs.write_text("before\n<!-- families -->\noutdated\n<!-- end of families -->\nafter\n")
    monkeypatch.setattr(families, "DOCS", docs)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(
        families,
        "random_backbone",
        lambda name: load_backbone(str(family_dir(name)), None, torch.device("cpu")),
    )
    for name in ("RN50", "ViT-B-16"):
        done = CliRunner().invoke(families.main, ["--models", name, "--docs"])
        assert done.exit_code == 0, done.output
    text = docs.read_text()
    assert text.startswith("before\n<!-- families -->\n| |")
    assert text.endswith("layer-norm\n<!-- end of families -->\nafter\n")
    assert "outdated" not in text
    first, second = (line for line in text.splitlines() if line.startswith(("| ViT", "| RN")))
    assert first.startswith("| ViT-B-16 | 16 |")
    assert second.startswith("| RN50 | 32 |")
    assert CliRunner().invoke(families.main, ["--only-table"]).stdout.strip() in text
