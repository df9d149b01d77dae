"""The tables in the docs are what was measured, and cells are measured once."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import ablation, cell, record, search
from capt_deploy.core.errors import ConfigError
from capt_train.config import TrainConfig
from capt_train.parts import GROUPS, PARTS

ROOT = Path(__file__).parents[2]
FIGURES = {key: 0.5 for _, key, share in ablation.COLUMNS if share}


def made(row: str, shots: int, seed: int, **figures: float) -> dict[str, Any]:
    numbers = {**FIGURES, "trained_parameters": 1234, "seconds": 5.0, "strength": 1.0, **figures}
    return {"row": row, "shots": shots, "seed": seed, **numbers}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have cells written elsewhere, of worlds that nobody opens."""

    @contextmanager
    def open_world(name: str) -> Iterator[cell.World]:
        yield cell.World("data", "model")

    for module in (ablation, search):
        monkeypatch.setattr(module, "open_world", open_world)
    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_a_table_gives_mean_and_deviation_over_the_seeds_that_are_there() -> None:
    cells = {
        "a": made("CoOp", 16, 1, base=0.50),
        "b": made("CoOp", 16, 2, base=0.54),
        "c": made("zero-shot", 1, 1, base=0.25),
    }
    text = ablation.markdown(cells)
    sixteen, one = text.split("### 1 shot\n")
    (row,) = [line for line in sixteen.splitlines() if line.startswith("| CoOp")]
    assert row.split("|")[2].strip() == "52.0 ± 2.8 (2)"
    assert "1,234" in row
    assert "| zero-shot | 25.0 (1) |" in one
    assert row.endswith("| - |")  # it has no κ
    tried = {"a": made("all", 4, 1, strength=0.5), "b": made("all", 4, 2, strength=0.0)}
    assert ablation.markdown(tried).endswith("| 0.25 |")


def test_goals_are_compared_with_what_was_reached() -> None:
    figures = {"harmonic": 0.5, "new": 0.5, "recovered": 0.4, "broken": 0.1}
    coop = {f"c{n}": made("CoOp", 16, n, **figures) for n in (1, 2, 3)}
    better = {**figures, "harmonic": 0.512, "new": 0.52, "ece_15_new_uncalibrated": 0.4}
    own = {f"o{n}": made("capt (default)", 16, n, **better) for n in (1, 2, 3)}
    frozen = {"z": made("zero-shot", 16, 1, new=0.51)}
    rows = ablation.goals({"cifar100": {**coop, **own, **frozen}}).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["met"] * 5
    assert "1.2" in rows[0]
    better["broken"] = 0.2
    worse = {f"o{n}": made("capt (default)", 16, n, **better) for n in (1, 2, 3)}
    rows = ablation.goals({"cifar100": {**coop, **worse, **frozen}}).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["met"] * 4 + ["**missed**"]


@pytest.mark.parametrize("world", ["cifar100", "cifar100-camera", "pictograms"])
def test_the_docs_show_the_table_of_the_cells(world: str) -> None:
    docs = (ROOT / "docs" / "ablation.md").read_text()
    assert ablation.markdown(ablation.load(world)) in docs


def test_the_docs_show_what_was_to_be_reached() -> None:
    reached = ablation.goals({world: ablation.load(world) for world in ablation.GOALS})
    assert reached in (ROOT / "docs" / "ablation.md").read_text()


@pytest.mark.parametrize("world", ["cifar100", "cifar100-camera", "pictograms"])
def test_no_cell_is_of_other_settings_than_now(world: str) -> None:
    place = cell.World("anywhere", "any")
    for one in ablation.load(world).values():
        config = ablation.config_of(place, one["row"], one["shots"], one["seed"])
        assert cell.settings_of(config) == one["settings"]


def test_the_docs_show_what_the_search_found() -> None:
    found = search._table(record.load_cells("search"))
    assert found in (ROOT / "docs" / "ablation.md").read_text()


@pytest.mark.usefixtures("results")
def test_a_cell_is_measured_once_and_again_with_other_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[TrainConfig] = []

    def measure(config: TrainConfig, split: str) -> dict[str, Any]:
        assert split == "test"
        asked.append(config)
        return made("", 0, 0)

    monkeypatch.setattr(cell, "measure", measure)
    arguments = ["--world", "pictograms", "--rows", "CoOp|+ CoA", "--shots", "4", "--seeds", "1,2"]
    for _ in range(2):
        done = CliRunner().invoke(ablation.main, arguments)
        assert done.exit_code == 0, done.output
    assert [(c.seed, sorted(c.parts)) for c in asked] == [
        *((1, ["prompt"]), (1, ["coa", "prompt"])),
        *((2, ["prompt"]), (2, ["coa", "prompt"])),
    ]
    cells = ablation.load("pictograms")
    cells["CoOp / 4 / 2"]["settings"]["learning_rate"] = 9.0
    record.write_result("ablation-pictograms", {"cells": cells})
    CliRunner().invoke(ablation.main, arguments)
    assert len(asked) == 5 and (asked[-1].seed, asked[-1].method) == (2, "coop")
    CliRunner().invoke(ablation.main, [*arguments, "--only-table"])
    assert len(asked) == 5
    CliRunner().invoke(ablation.main, [*arguments, "--again"])
    assert len(asked) == 9


def test_every_part_of_the_method_has_a_row() -> None:
    added = {part for row in ablation.ROWS.values() for part in row.get("added", ())}
    alone = {part for name in added for part in GROUPS.get(name, (name,))}
    deep = {"text-prompts", "visual-prompts"}  # only in the row of all parts
    assert alone | {"prompt"} | deep == {*PARTS}


def test_settings_of_a_cell_leave_out_places_and_what_is_idle() -> None:
    text = TrainConfig("/here", "/there", method="coop")
    both = TrainConfig("/here", "/there")
    assert cell.settings_of(text) == cell.settings_of(TrainConfig("x", "y", method="coop"))
    assert "visual_epochs" not in cell.settings_of(text)
    assert "visual_epochs" in cell.settings_of(both)
    assert {"shots", "seed", "weights"} <= {*cell.settings_of(text)}
    assert "label_noise" not in cell.settings_of(text)  # cells were measured before
    assert cell.settings_of(text.with_settings({"label_noise": "0.2"}))["label_noise"] == "0.2"


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="pictograms"), cell.open_world("mars"):
        pass


def test_a_trial_of_the_search_changes_settings_and_parts() -> None:
    start = TrainConfig("data", "model")
    assert search._changed(start, "default") == start
    assert search._changed(start, "CoOp").parts == {"prompt"}
    changed = search._changed(start, "visual_epochs=3,without=adapter+infonce,added=mixture")
    assert changed.visual_epochs == 3
    assert changed.parts == start.parts - {"adapter", "infonce"} | {"mixture"}


def test_the_readme_table_is_taken_from_the_cells() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", readme, re.MULTILINE)
    shown = {row: cells.split(" | ") for row, cells in rows}
    worlds = [ablation.load(name) for name in ("cifar100", "cifar100-camera")]
    for row in ("zero-shot", "CoOp", "capt (default)"):
        expected = []
        for cells in worlds:
            own = [c for c in cells.values() if (c["row"], c["shots"]) == (row, 16)]
            for key in ("base", "new", "harmonic"):
                expected.append(ablation.mean(own, key, True))
        assert shown[row] == expected


@pytest.mark.usefixtures("results")
def test_the_search_prints_gains_over_coop_by_trial_and_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(config: TrainConfig, split: str) -> dict[str, Any]:
        assert split == "val"
        harmonic = 0.5 if config.method == "coop" else 0.52 + 0.01 * config.seed
        return {**made("", 0, 0), "harmonic": harmonic, "tried": "nothing else"}

    monkeypatch.setattr(cell, "measure", measure)
    done = CliRunner().invoke(
        search.main, ["--worlds", "here", "--try", "visual_epochs=2", "--seeds", "1,2"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-2:] == [
        "| CoOp | 16 | +0.0 (2) |",
        "| visual_epochs=2 | 16 | +3.5 (2) |",
    ]
