"""A run lists its suspect labels and its copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import read_json
from capt_train.config import TrainConfig
from capt_train.data.suspects import SUSPECTS, Suspects
from capt_train.pipeline import train
from capt_train.run.folder import SPLIT
from tests.conftest import write_photos

Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return photos, one of which has a copy in every split."""
    root = write_photos(tmp_path_factory.mktemp("copied"))
    photo = sorted((root / "train").rglob("*.png"))[0]
    others = sorted(file.name for file in (root / "train").iterdir())
    shutil.copy(photo, root / "train" / others[-1] / "again.png")
    shutil.copy(photo, root / "val" / others[0] / "again.png")
    shutil.copy(photo, root / "test" / others[0] / "again.png")
    return root


def suspects_of(configure: Configure, data: Path, run: Path, **settings: object) -> Suspects:
    config = configure(data=str(data), method="capt", without=("prompt",), shots=None, **settings)
    train(config, run)
    return Suspects.load(run / SUSPECTS)


def test_all_photos_are_judged_and_copies_found_across_splits(
    configure: Configure, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = suspects_of(configure, data, tmp_path / "run")
    split = read_json(tmp_path / "run" / SPLIT, RunError)
    used = {name: {path for path, *_ in split[name]} for name in ("train", "val")}
    judged = {(photo.split, photo.path) for photo in found.labels}
    assert {path for name, path in judged if name == "val"} == used["val"]
    # the folds of the choice have judged the training photos as well
    assert {path for name, path in judged if name == "train"} == used["train"]
    assert [p.p_label for p in found.labels] == sorted(p.p_label for p in found.labels)
    copies = {frozenset((copy.first, copy.second)): copy for copy in found.copies}
    files = sorted(path for pair in copies for path in pair)
    assert any(path.startswith("test/") for path in files)
    problems = [copy.problem for copy in found.copies]
    assert {"two labels", "two splits"} == {*problems}
    assert problems == sorted(problems)
    assert "with a copy in another split or class: capt-suspects" in capsys.readouterr().err


def test_without_validation_photos_the_folds_judge(
    configure: Configure, data: Path, tmp_path: Path
) -> None:
    unsplit = tmp_path / "unsplit"
    shutil.copytree(data / "train", unsplit)
    found = suspects_of(configure, unsplit, tmp_path / "run")
    assert {photo.split for photo in found.labels} == {"train"}
    assert len(found.labels) == len(list(unsplit.rglob("*.png")))
