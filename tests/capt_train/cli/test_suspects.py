"""`capt-suspects` lists what to look at, and changes nothing."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from capt_train.cli.suspects import main
from capt_train.data.copies import Copy
from capt_train.data.suspects import SUSPECTS, SuspectLabel, Suspects

LABELS = (
    SuspectLabel("train/a.jpg", "train", "otter", 0.01, "mink", 0.9, 0.8),
    SuspectLabel("train/b, 2.jpg", "train", "mink", 0.2, "otter", 0.7, 0.6),
    SuspectLabel("val/c.jpg", "val", "otter", 0.95, "otter", 0.95, 0.01),
)
COPIES = (
    Copy("train/a.jpg", "train/x.jpg", ("train", "train"), ("otter", "mink"), 1.0),
    Copy("train/b.jpg", "val/y.jpg", ("train", "val"), ("mink", "mink"), 0.995),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Suspects(LABELS, 0.1, COPIES).save(tmp_path / "run" / SUSPECTS)
    return tmp_path / "run"


def suspects(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_it_says_how_many_to_look_at_and_lists_copies(run: Path) -> None:
    text = suspects(run, "--top", "0").stdout
    assert "About 10% of the labels of 3 photos seem to be wrong; look at the first 2." in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith("train/")] == [
        *("train/a.jpg", "train/b,", "train/a.jpg", "train/b.jpg")
    ]
    assert "val/c.jpg" not in text
    assert "otter / mink" in text
    assert "two labels" in text
    assert "train / val" in text
    assert "val/c.jpg" in suspects(run).stdout


def test_json_and_csv_hold_all(run: Path, tmp_path: Path) -> None:
    content = json.loads(suspects(run, "--json").stdout)
    assert [row["path"] for row in content["labels"]] == [photo.path for photo in LABELS]
    assert content["copies"][0]["labels"] == ["otter", "mink"]
    assert content["copies"][0]["problem"] == "two labels"
    assert content["probably_wrong"] == 2
    rows = list(csv.DictReader(io.StringIO(suspects(run, "--csv", "-").stdout)))
    assert [row["path"] for row in rows] == [photo.path for photo in LABELS]
    assert float(rows[0]["p_label"]) == 0.01
    suspects(run, "--csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == suspects(run, "--csv", "-").stdout
    assert "nothing is overwritten" in suspects(run, "--csv", tmp_path / "out.csv", code=2).output


def test_a_run_without_anything_suspect_says_so(tmp_path: Path) -> None:
    Suspects((), 0.0, ()).save(tmp_path / SUSPECTS)
    text = suspects(tmp_path).stdout
    assert "no label could be judged" in text
    assert "No copies of a photo were found." in text


def test_without_a_share_of_wrong_labels_nothing_is_called_wrong(tmp_path: Path) -> None:
    labels = tuple(replace(photo, p_wrong=0.0) for photo in LABELS)
    Suspects(labels, 0.0, ()).save(tmp_path / SUSPECTS)
    text = suspects(tmp_path, "--top", "1").stdout
    assert "3 photos cannot tell how many labels are wrong" in text
    assert "train/a.jpg" in text
    assert "val/c.jpg" not in text


def test_bad_input_is_refused(run: Path, tmp_path: Path) -> None:
    assert "expected the folder of a finished run" in suspects(tmp_path, code=2).output
    assert "choose one of them" in suspects(run, "--json", "--csv", "-", code=2).output
    (run / SUSPECTS).write_text("[]")
    assert "not as capt-train writes it" in suspects(run, code=2).output


def test_it_needs_no_torch(run: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from capt_train.cli.suspects import main
main([{str(run)!r}], standalone_mode=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
