from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.nn import functional

from capt_train.cli.confusions import main
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.confusions import CONFUSIONS, read_confusions, write_confusions

NAMES = ("sea otter, wild", "beaver", "mink")
LABELS = (0, 0, 0, 1, 1, 2)
SAMPLES = tuple(f"train/{number}.jpg" for number in range(6))
PNG = b"\x89PNG\r\n\x1a\n"


def bank(*predicted: int) -> ConfusionBank:
    logits = 9.0 * functional.one_hot(torch.tensor(predicted), 3)
    return ConfusionBank.fill(logits, torch.tensor(LABELS), torch.eye(6))


def make_run(folder: Path, before: tuple[int, ...], after: tuple[int, ...]) -> Path:
    write_confusions(folder / CONFUSIONS, NAMES, bank(*before), bank(*after), SAMPLES)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", (1, 1, 0, 0, 1, 2), (0, 1, 2, 0, 1, 2))


def confusions(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_table_has_the_worst_pair_first_and_the_sum_of_all(run: Path) -> None:
    assert [line.rstrip() for line in confusions(run).stdout.splitlines()] == [
        "confused pair (held-out images)   before  after",
        "--------------------------------  ------  -----",
        "sea otter, wild taken for beaver       2      1",
        "sea otter, wild taken for mink         0      1",
        "beaver taken for sea otter, wild       1      1",
        "all, of 6 images of 3 classes          3      3",
    ]


@pytest.mark.parametrize(
    ("top", "shown", "rest"), [(0, 0, "3"), (1, 1, "2"), (2, 2, "1"), (3, 3, None)]
)
def test_top_cuts_the_table_and_says_what_it_leaves_out(
    top: int, shown: int, rest: str | None, run: Path
) -> None:
    lines = confusions(run, "--top", str(top)).stdout.splitlines()
    assert sum("taken for" in line for line in lines) == shown
    assert [line.split()[0] for line in lines if "more)" in line] == ([f"({rest}"] if rest else [])
    if top == 1:
        assert lines[-2].split() == ["(2", "more)", "1", "2"]
    assert lines[-1].endswith("3      3")


def test_fractions_show_one_decimal(tmp_path: Path) -> None:
    right = 9.0 * functional.one_hot(torch.tensor(LABELS), 3)
    before = bank(1, 1, 0, 0, 1, 2)
    after = before.updated(right, 0.777)
    write_confusions(tmp_path / CONFUSIONS, NAMES, before, after, SAMPLES)
    assert "taken for beaver       2    1.6" in confusions(tmp_path).stdout
    rows = confusions(tmp_path, "--csv", "-").stdout
    assert "beaver,2,1.554\n" in rows


def test_a_run_without_confusion_has_a_table_of_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, LABELS, LABELS)
    assert confusions(run).stdout.splitlines()[2:] == [
        "all, of 6 images of 3 classes         0      0"
    ]
    assert confusions(run, "--csv", "-").stdout == "true,predicted,before,after\n"
    confusions(run, "--png", tmp_path / "none.png")


def test_json_on_stdout_is_the_whole_file(run: Path) -> None:
    printed = confusions(run, "--json", "--top", "1").stdout
    assert json.loads(printed) == json.loads((run / CONFUSIONS).read_text(encoding="utf-8"))


ROWS = [
    ["true", "predicted", "before", "after"],
    ["sea otter, wild", "beaver", "2", "1"],
    ["sea otter, wild", "mink", "0", "1"],
    ["beaver", "sea otter, wild", "1", "1"],
]


def test_csv_goes_to_a_new_file_beside_the_table_or_to_stdout_alone(
    run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "pairs.csv"
    result = confusions(run, "--csv", file, "--top", "1")
    assert list(csv.reader(io.StringIO(file.read_text()))) == ROWS
    assert "taken for" in result.stdout
    assert result.stderr == f"wrote {file}\n"
    assert list(csv.reader(io.StringIO(confusions(run, "--csv", "-").stdout))) == ROWS


def test_csv_and_png_may_come_with_json(run: Path, tmp_path: Path) -> None:
    files = ["--csv", tmp_path / "a.csv", "--png", tmp_path / "a.png"]
    result = confusions(run, "--json", *files)
    assert json.loads(result.stdout)["schema"] == 1
    assert (tmp_path / "a.csv").read_text().count("\n") == 4
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("option", ["--csv", "--png"])
def test_nothing_is_overwritten(option: str, run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    result = confusions(run, "--csv", tmp_path / "other.csv", option, there, code=2)
    assert result.stderr.startswith(f"Error: {there}: already there")
    assert there.read_text() == "mine"
    assert not (tmp_path / "other.csv").exists()
    assert confusions(run, option, tmp_path, code=2).stderr.startswith(
        f"Error: {tmp_path}: already"
    )


def test_one_stdout_cannot_take_json_and_csv(run: Path) -> None:
    assert "choose" in confusions(run, "--json", "--csv", "-", code=2).stderr


def test_a_folder_that_is_no_run_and_a_damaged_one_are_refused(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        error = confusions(folder, code=2).stderr
        assert error.startswith(f"Error: {folder}: no confusions.json")
        assert error.count("\n") == 1
    (run / CONFUSIONS).write_text("{}")
    assert "not as capt-train writes it" in confusions(run, code=2).stderr


def test_the_picture_gets_the_matrices_in_order(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(
        "capt_train.confusion.plot.plot_confusions", lambda *args: drawn.extend(args)
    )
    confusions(run, "--png", tmp_path / "a.png")
    path, counts, names, classes = drawn
    assert path == tmp_path / "a.png"
    assert np.array_equal(counts, read_confusions(run / CONFUSIONS).matrices())
    assert names == NAMES
    assert classes == len(NAMES)


def test_help_has_an_example_and_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from capt_train.cli.confusions import main; main(['-h'], 'x', None, False);"
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "capt-confusions runs/mine --csv pairs.csv" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
