from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import CaptError, DataError, RunError
from capt_train import pipeline
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.run import folder as runs
from capt_train.tune import epochs
from capt_train.tune.tune import LAST

Configure = Callable[..., TrainConfig]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_resume_with_other_settings_is_refused_and_names_them(
    configure: Configure, finished: Path
) -> None:
    with pytest.raises(RunError, match=r"other settings: shots 3 → 2; tuning.epochs 3 → 9$"):
        train(configure(classes="base", shots=2, tuning_epochs=9), finished, resume=True)


def test_resume_of_a_finished_run_changes_no_weights(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    report = train(configure(classes="base"), run, resume=True)
    assert weights(run) == weights(finished)
    assert report == read(finished / "metrics.json")


def test_resume_of_nothing_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        train(configure(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resume_notices_changed_data_and_a_changed_model(
    configure: Configure, photos: Path, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    model = Path(shutil.copytree(write_model(seed=1), tmp_path / "model"))
    config = configure(data=str(own), model=f"local-dir:{model}", method="zeroshot")
    train(config, tmp_path / "run")
    shutil.rmtree(model)
    shutil.copytree(write_model(seed=2), model)
    with pytest.raises(RunError, match="begun with another model"):
        train(config, tmp_path / "run", resume=True)
    (own / "val" / "red_ball" / "0.png").unlink()
    with pytest.raises(DataError, match="1 of the run's"):
        train(config, tmp_path / "run", resume=True)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that begins a run and stops it after the first epoch of a stage."""

    def interrupt(config: TrainConfig, out: Path, stage: str = "") -> None:
        save = epochs.save_checkpoint

        def save_and_stop(path: Path, *arguments: Any) -> None:
            save(path, *arguments)
            if path == out / f"{stage}{LAST}":
                raise KeyboardInterrupt

        monkeypatch.setattr(epochs, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
        monkeypatch.setattr(epochs, "save_checkpoint", save)

    return interrupt


@pytest.mark.parametrize(
    ("visual", "stage"), [((), ""), (("adapter",), "text-"), (("adapter",), "")]
)
def test_a_run_whose_inputs_have_moved_resumes_to_the_same_bits(
    visual: tuple[str, ...],
    stage: str,
    configure: Configure,
    interrupt: Callable[..., None],
    photos: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "names.json").write_text('{"red_ball": "ball"}')
    (tmp_path / "pairs.json").write_text('{"ball|blue sky": {"difference": ["One is round."]}}')
    files = {"class_names": "names.json", "confusion_sentences": "pairs.json"}
    added = ("semantic-experts", *visual)
    common = {
        "tuning_patience": 0,
        "method": "coop",
        "added": added,
        "visual_views": 3,
        "visual_strength": "1",
    }
    settings = {**common, **{name: str(tmp_path / file) for name, file in files.items()}}
    own = {**settings, "data": str(shutil.copytree(photos, tmp_path / "photos"))}
    own["model"] = f"local-dir:{shutil.copytree(tiny_model_dir, tmp_path / 'model')}"
    train(configure(**settings), tmp_path / "whole")
    run = tmp_path / "run"
    interrupt(configure(**own), run, stage)
    assert not (run / "result.json").exists()
    assert weights(run) != weights(tmp_path / "whole")
    (tmp_path / "moved").mkdir()
    for name in ("photos", "model", *files.values()):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(CaptError, match="photos: no such folder"):
        train(configure(**own), run, resume=True)
    new = {
        "data": str(tmp_path / "moved" / "photos"),
        "model": f"local-dir:{tmp_path / 'moved' / 'model'}",
        **{name: str(tmp_path / "moved" / file) for name, file in files.items()},
        **common,
    }
    report = train(configure(**new), run, resume=True)
    assert weights(run) == weights(tmp_path / "whole")
    assert report == read(tmp_path / "whole" / "metrics.json")
    assert read(run / "result.json") == read(tmp_path / "whole" / "result.json")
    written = read(run / "config.json")["config"]
    # the sentences have come from where they were
    kept = {"added": added, "confusion_sentences": settings["confusion_sentences"]}
    assert TrainConfig.from_dict(written, CaptError) == configure(**{**new, **kept})


def test_a_default_run_interrupted_after_its_choice_resumes_to_the_same_bits(
    default_run: tuple[TrainConfig, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, whole = default_run
    run, write = tmp_path / "run", runs.write_choice

    def write_and_stop(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_choice", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert not (run / LAST).exists()
    monkeypatch.delattr(pipeline, "choose")  # the choice is read
    assert train(config, run, resume=True) == read(whole / "metrics.json")
    assert contents(run) == contents(whole)


def test_a_default_run_interrupted_in_its_epochs_resumes_to_the_same_bits(
    default_run: tuple[TrainConfig, Path], interrupt: Callable[..., None], tmp_path: Path
) -> None:
    config, whole = default_run
    run = tmp_path / "run"
    interrupt(config, run)
    assert (run / runs.CHOICE).read_bytes() == (whole / runs.CHOICE).read_bytes()
    assert (run / LAST).read_bytes() != (whole / LAST).read_bytes()
    assert train(config, run, resume=True) == read(whole / "metrics.json")
    assert contents(run) == contents(whole)


def test_a_run_may_be_resumed_on_another_device(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    train(configure(classes="base", device="auto"), run, resume=True)
    assert weights(run) == weights(finished)
    before, after = read(finished / "config.json"), read(run / "config.json")
    assert after.pop("config") == {**before.pop("config"), "device": "auto"}
    assert after == before


def test_moved_inputs_with_other_content_are_refused_and_change_nothing(
    configure: Configure,
    interrupt: Callable[..., None],
    photos: Path,
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    interrupt(configure(), run)
    before = contents(run)
    moved = Path(shutil.copytree(photos, tmp_path / "photos"))
    path = read(run / "split.json")["train"][0][0]
    shutil.copy(photos / "test" / "red_ball" / "0.png", moved / path)
    (tmp_path / "names.json").write_text('{"red_ball": "ball"}')
    bad: list[tuple[dict[str, str], type[CaptError], str]] = [
        ({"data": str(moved)}, DataError, f"1 of the run's.*{path}"),
        ({"class_names": str(tmp_path / "names.json")}, DataError, "class names are not the"),
        ({"model": f"local-dir:{write_model(seed=3)}"}, RunError, "begun with another model"),
    ]
    for settings, error, message in bad:
        with pytest.raises(error, match=message):
            train(configure(**settings), run, resume=True)
        assert contents(run) == before


def test_paths_of_a_run_do_not_depend_on_the_folder_it_was_started_in(
    configure: Configure, photos: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(photos.parent)
    config = configure(
        data=photos.name,
        model=f"../{tiny_model_dir.relative_to(photos.parent.parent)}",
        method="zeroshot",
    )
    train(config, tmp_path / "run")
    written = read(tmp_path / "run" / "config.json")["config"]
    assert written["data"] == str(photos)
    assert written["model"] == f"local-dir:{tiny_model_dir}"
    monkeypatch.chdir(tmp_path)
    train(TrainConfig.from_dict(written, CaptError), tmp_path / "run", resume=True)
