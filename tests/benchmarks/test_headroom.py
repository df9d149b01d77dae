"""The docs show what was measured; the context is tuned on what is said."""

from pathlib import Path

import pytest

from benchmarks import ablation, cell, headroom, record
from capt_train.config import TrainConfig
from capt_train.tune.stages import Stage, TuningTask

ROOT = Path(__file__).parents[2]


def test_the_docs_show_the_table_of_the_cells() -> None:
    cells = record.load_cells(headroom.NAME)
    assert set(cells) == {*ablation.GOALS}
    assert headroom.markdown(cells) in (ROOT / "docs" / "ablation.md").read_text()


def test_a_context_is_tuned_on_every_test_image(
    photos: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[TuningTask] = []

    def tune(learner: object, task: TuningTask, folder: Path, stage: Stage) -> None:
        tasks.append(task)
        real(learner, task, folder, stage)  # type: ignore[arg-type]

    def quick(place: cell.World, row: str, shots: int, seed: int) -> TrainConfig:
        return TrainConfig(
            place.data, place.model, method="coop", classes="base", shots=2, seed=seed, epochs=1
        )

    real = headroom.tune
    monkeypatch.setattr(headroom, "tune", tune)
    monkeypatch.setattr(ablation, "config_of", quick)
    found = headroom.measure(cell.World(str(photos), f"local-dir:{tiny_model_dir}"))
    (task,) = tasks
    assert len(task.train) == sum(1 for _ in (photos / "test").rglob("*.png"))
    assert not len(task.val)
    assert task.tuned == tuple(range(len(task.reference)))
    assert set(headroom.COLUMNS) <= set(found)
