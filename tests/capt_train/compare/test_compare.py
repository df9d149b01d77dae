"""capt-compare from its configuration to the tables, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from capt_deploy.core.errors import CaptError
from capt_train.cli.compare import main
from capt_train.compare import measure as measuring
from capt_train.compare import run as running
from capt_train.compare.plan import read_plan
from capt_train.config import TrainConfig
from capt_train.pipeline import tune_and_measure
from capt_train.run.elsewhere import for_classes

FEW = {"tuning.epochs": 2, "tuning.patience": 0}
Write = Callable[..., Path]


@pytest.fixture
def write(photos: Path, tiny_model_dir: Path, tmp_path: Path) -> Write:
    """Return a function that writes a configuration of cells of a second."""

    def write(**changes: Any) -> Path:
        content = {
            "model": f"local-dir:{tiny_model_dir}",
            "data": {"colours": {"path": str(photos), "classes": "base"}},
            "methods": ["zeroshot", {"name": "CoOp", "method": "coop", "settings": FEW}],
            "shots": [2, 1],
            "calibrations": ["none", "temperature", "chosen", "dac", "sals"],
            "settings": {"calibration.calibrator": "temperature"},
            **changes,
        }
        path = tmp_path / "papers.json"
        path.write_text(json.dumps(content))
        return path

    return write


def compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_cells_are_measured_once_and_tables_are_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(reference="zeroshot")
    done = compare(config, "--figures")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "papers"
    cells = lines(folder)
    assert [cell["key"] for cell in cells] == [
        f"colours / {row} / {shots} / 1" for shots in (2, 1) for row in ("zeroshot", "CoOp")
    ]
    first = cells[1]
    assert 0 <= first["base"] <= 1 and 0 <= first["new"] <= 1 and first["transductive"] == 0
    assert {*first["ece"]} == {"none", "temperature", "chosen", "dac", "sals"}
    assert first["numbers"] == 4 * 32 and first["images"] == {"train": 4, "val": 8}
    markdown = (folder / "table.md").read_text()
    assert "### colours, 2 shots" in markdown and "| CoOp (1 seed) |" in markdown
    assert "<th>harmonic</th>" in (folder / "table.html").read_text()
    assert r"\toprule" in (folder / "table.tex").read_text()
    pictures = {file.name for file in folder.glob("*.png")}
    assert pictures == {"colours-shots.png", "colours-ece.png"}

    def refuse(*_: object) -> None:
        raise AssertionError("a second start measures nothing")

    monkeypatch.setattr(measuring, "measure", refuse)
    again = compare(config, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {"cells": cells, "failed": {}}
    assert "4 cells measured, 0 to go" in again.stderr


def test_figures_are_those_of_the_run_itself(write: Write, tmp_path: Path) -> None:
    plan = read_plan(write(shots=[2]))
    cell = plan.cells[1]
    figures = measuring.measure(cell, plan.calibrations)
    report = tune_and_measure(cell.config, tmp_path / "run").report
    for scope in ("base", "new", "all"):
        assert figures[scope] == report["uncalibrated"][scope]["accuracy"]
        assert figures["ece"]["none"][scope] == pytest.approx(
            report["uncalibrated"][scope]["ece_15"]
        )
        for name in ("temperature", "chosen"):
            assert figures["ece"][name][scope] == pytest.approx(report[scope]["ece_15"], abs=1e-6)
    assert figures["ece"]["dac"]["base"] == figures["ece"]["temperature"]["base"]
    zero_shot = measuring.measure(plan.cells[0], plan.calibrations)["ece"]
    assert zero_shot["sals"]["all"] == pytest.approx(zero_shot["none"]["all"])  # its own range


def test_changed_settings_are_measured_anew(write: Write, tmp_path: Path) -> None:
    assert compare(write(shots=[1])).exit_code == 0
    method = {"name": "CoOp", "method": "coop", "settings": {**FEW, "tuning.epochs": 1}}
    done = compare(write(shots=[1], methods=["zeroshot", method]))
    assert "1 cell measured, 1 to go" in done.stderr
    assert len(lines(tmp_path / "papers")) == 3


def test_a_part_of_a_line_that_a_kill_has_left_is_measured_again(
    write: Write, tmp_path: Path
) -> None:
    config = write(shots=[1])
    assert compare(config).exit_code == 0
    path = tmp_path / "papers" / "cells.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 20])
    done = compare(config)
    assert "1 cell measured, 1 to go" in done.stderr
    assert [cell["key"] for cell in lines(tmp_path / "papers")] == [
        "colours / zeroshot / 1 / 1",
        "colours / CoOp / 1 / 1",
    ]


@pytest.mark.parametrize("line", ['{"key": 1}', "{", "[" * 100_000, "1" * 5000])
def test_a_line_that_is_no_cell_is_an_error_with_its_place(
    line: str, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "cells.jsonl").write_text(f"{line}\n")
    done = compare(write())
    assert done.exit_code == 2
    assert "cells.jsonl, line 1: not as capt-compare writes it" in done.stderr


def test_one_cell_that_fails_does_not_end_the_others(write: Write, tmp_path: Path) -> None:
    loud = {"name": "loud", "method": "coop", "settings": {**FEW, "tuning.learning_rate": 1e30}}
    config = write(methods=[loud, "zeroshot"], shots=[1])
    done = compare(config)
    assert done.exit_code == 2
    assert "colours / loud / 1 / 1: " in done.stderr and "became" in done.stderr
    assert "1 cells failed; the next start tries them again" in done.stderr
    assert [cell["row"] for cell in lines(tmp_path / "papers")] == ["zeroshot"]
    assert "1 cell measured, 1 to go" in compare(config).stderr


def test_processes_measure_the_same(write: Write, tmp_path: Path) -> None:
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    assert compare(write(shots=[1]), "--out", alone).exit_code == 0
    done = compare(write(shots=[1], processes=2), "--out", beside)
    assert done.exit_code == 0, done.output

    def figures(folder: Path) -> dict[str, Any]:
        kept = ("base", "new", "all", "ece", "settings")
        return {cell["key"]: [cell[name] for name in kept] for cell in lines(folder)}

    assert figures(alone) == figures(beside)


def test_a_process_that_is_killed_does_not_end_the_others(write: Write, tmp_path: Path) -> None:
    killer = {"name": "killer", "method": "coop", "settings": {**FEW, "prompt.words": "KILL"}}
    config = write(methods=[killer, "zeroshot", "class-means"], shots=[1], processes=2)
    # a worker imports this module by its name, and with it what kills it
    code = "from tests.capt_train.compare.killing import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "its process was killed; perhaps there is too little memory" in done.stderr
    rows = {cell["row"] for cell in lines(tmp_path / "papers")}
    assert "class-means" in rows and "killer" not in rows


def test_two_writers_in_one_folder_are_refused(write: Write, tmp_path: Path) -> None:
    from filelock import FileLock

    folder = tmp_path / "papers"
    folder.mkdir()
    with FileLock(folder / f".{running.CELLS}.lock"):
        done = compare(write())
    assert done.exit_code == 2 and "another capt-compare is writing there" in done.stderr


def test_another_data_set_is_measured_with_its_own_names(
    write: Write, photos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for place, name in enumerate(sorted(child.name for child in (photos / "test").iterdir())):
        # two classes that the run knows, in another order, and two new ones
        shutil.copytree(
            photos / "test" / name, other / "test" / (name if place < 2 else f"new{place}")
        )
    plan = read_plan(write(shots=[1], targets={"shift": str(other)}))
    figures = measuring.measure(plan.cells[1], plan.calibrations)
    assert {*figures["targets"]["shift"]} == {"all", "ece"}
    done = compare(write(shots=[1], targets={"shift": str(other)}))
    assert "| shift | ECE shift |" in done.stdout


def test_a_run_keeps_the_rows_of_classes_that_it_knows(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    model = tune_and_measure(configure(method="coop", classes="base"), tmp_path / "run").model
    names = ("old tractor", model.class_names[1], model.class_names[0])
    other = for_classes(model, names)
    assert other.class_names == names and other.tuned == (False, True, True)
    np.testing.assert_array_equal(other.class_rows.rows[1:], model.class_rows.rows[[1, 0]])
    expected = model.learner.texts_of(["old tractor"], model.zero_shot[:1]).embeddings[0]
    np.testing.assert_allclose(
        other.class_rows.rows[:1], model.outside_rows(expected).detach(), atol=1e-6
    )
    cache = tune_and_measure(
        configure(method="tip-adapter", classes="base"), tmp_path / "cache"
    ).model
    with pytest.raises(CaptError, match="not measured on other classes"):
        for_classes(cache, names)
