"""The table in the docs is what was found out, and what is found out is right for small models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import families, record
from capt_train.clip.loading import load_backbone
from tests.families import FAMILIES, family

ROOT = Path(__file__).parents[2]
Family = Callable[[str], Path]


def test_the_docs_show_the_table_of_the_rows() -> None:
    rows = families.load()
    assert {*rows} == {*families.MODELS}
    assert families.markdown(rows) in (ROOT / "docs" / "families.md").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_can_have_what_the_large_one_has(family_dir: Family, name: str) -> None:
    small = families.support(load_backbone(str(family_dir(name)), None, torch.device("cpu")))
    large = families.load()[name]
    same = {*families.PARTS, "normalisation", "notes"} - {"text-prompts"}
    assert {key: small[key] for key in same} == {key: large[key] for key in same}
    assert small["text-prompts"] == 2  # blocks
    assert small["parameters"] < large["parameters"]


def test_what_is_refused_is_said_in_the_row(write_model: Callable[..., Path]) -> None:
    own = family("ViT-B-16-SigLIP")
    folder = write_model(**{**own, "text_cfg": {**own["text_cfg"], "layers": 1}})
    content = json.loads((folder / "tokenizer.json").read_text())
    units = content["model"]["vocab"]
    content["model"]["vocab"] = [[unit[:2], score] for unit, score in units[:20]]  # no words left
    (folder / "tokenizer.json").write_text(json.dumps(content))
    row = families.support(load_backbone(str(folder), None, torch.device("cpu")))
    assert (row["mixture"], row["text-prompts"], row["prompt"]) == (False, False, True)
    assert "tune without the mixture" in row["notes"][-1]
    assert "| - |" in families.markdown({"other": row})


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
    assert text.endswith("visual-prompts\n<!-- end of families -->\nafter\n")
    assert "outdated" not in text
    first, second = (line for line in text.splitlines() if line.startswith(("| ViT", "| RN")))
    assert first.startswith("| ViT-B-16 | 16 |")
    assert second.startswith("| RN50 | 32 |")
    assert CliRunner().invoke(families.main, ["--only-table"]).stdout.strip() in text
