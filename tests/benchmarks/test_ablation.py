"""The tables in the docs are those of the stored cells, and a cell is measured once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import ablation, record
from benchmarks.cell import World, open_world
from capt_deploy.core.errors import ConfigError
from capt_train.config import TrainConfig

DOCS = (Path(__file__).parents[2] / "docs" / "ablation.md").read_text()
README = (Path(__file__).parents[2] / "README.md").read_text()
FIGURES = {key: 0.5 for _, key, share in ablation.COLUMNS if share}


@pytest.mark.parametrize("world", [*ablation.WORLDS, "pictograms"])
def test_the_docs_show_the_table_of_the_cells(world: str) -> None:
    assert ablation.markdown(ablation.load(world)) in DOCS


def test_docs_and_readme_show_the_goals_and_the_overview() -> None:
    assert ablation.goals({world: ablation.load(world) for world in ablation.GOALS}) in DOCS
    worlds = {world: ablation.load(world) for world in ablation.WORLDS}
    assert ablation.overview(worlds) in DOCS
    assert ablation.overview(worlds, shots=(16, 4)) in README and ablation.errors(worlds) in README


def test_a_cell_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def open_nothing(name: str) -> Iterator[World]:
        yield World("data", "model")

    configs: list[TrainConfig] = []

    def measure(config: TrainConfig, split: str) -> dict[str, Any]:
        assert split == "test"
        configs.append(config)
        return {**FIGURES, "trained_parameters": 1234, "seconds": 5.0}

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(ablation, "open_world", open_nothing)
    monkeypatch.setattr(ablation, "measure", measure)
    arguments = ["--world", "w", "--rows", "CoOp|GDA", "--shots", "4", "--seeds", "1,2"]
    for extra in ([], [], ["--only-table"], ["--again"]):
        done = CliRunner().invoke(ablation.main, [*arguments, *extra])
        assert done.exit_code == 0, done.output
    once = [{"prompt"}, {"rows"}] * 2
    assert [set(config.parts) for config in configs] == once * 2
    cells = ablation.load("w")
    assert "| CoOp | 50.0 ± 0.0 (2) |" in ablation.markdown(cells) and "1,234" in done.output
    assert all(cell["commit"] for cell in cells.values())


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="pictograms"), open_world("mars"):
        pass
