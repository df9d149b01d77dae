from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import CaptError, ConfigError, DataError, ModelError, RunError
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.run.folder import read_config
from tests.configs import NAMES

Configure = Callable[..., TrainConfig]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_an_existing_run_is_not_overwritten(configure: Configure, finished: Path) -> None:
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    with pytest.raises(RunError, match="holds a run; continue it with --resume"):
        train(configure(classes="base"), finished)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_a_folder_with_other_files_is_not_used(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="already exists and is not a run"):
        train(configure(), tmp_path)
    with pytest.raises(RunError, match="already exists and is not a run"):
        train(configure(), tmp_path / "thesis.tex")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_split_from_uses_the_images_of_another_run(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    train(configure(classes="base", seed=5), tmp_path / "run", split_from=finished)
    assert read(tmp_path / "run" / "split.json") == read(finished / "split.json")
    with pytest.raises(RunError, match="nowhere"):
        train(configure(), tmp_path / "other", split_from=tmp_path / "nowhere")
    written = read_config(tmp_path / "run")[0]
    theirs = read_config(finished)[0]
    assert (written.classes, written.shots, written.seed) == (theirs.classes, theirs.shots, 5)
    with pytest.raises(ConfigError, match="split-from"):
        train(written, tmp_path / "run", resume=True, split_from=finished)


def test_a_model_named_like_a_folder_that_is_no_model_stays_an_architecture(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    with pytest.raises(ModelError, match="'ViT-B-16': pass --pretrained"):
        train(configure(model="ViT-B-16"), tmp_path / "run")


def test_a_failed_run_leaves_nothing_behind(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    bad = [
        {"data": str(tmp_path / "nowhere")},
        {"model": "local-dir:nowhere"},
        {"device": "cuda:99"},
        {"class_names": str(tmp_path / "names.json")},
        {"method": "full", "prompt_depth": 2, "confusion_sentences": str(tmp_path / "pairs.json")},
        {
            "method": "full",
            "prompt_depth": 2,
            "confusion_commonality": str(tmp_path / "common.json"),
        },
        {
            "method": "full",
            "prompt_depth": 2,
            "confusion_llm_url": "ftp://host/v1",
            "confusion_llm_model": "tiny",
        },
    ]
    for settings in bad:
        with pytest.raises(CaptError):
            train(configure(**settings), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):  # the commands say it in one line
        train(configure(method="zeroshot"), tmp_path / "file" / "run")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_tokenizer_without_words_for_the_mixture_is_refused_before_anything_is_tuned(
    configure: Configure, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(family_dir("ViT-B-16-SigLIP"), tmp_path / "model")
    content = read(model / "tokenizer.json")
    units = content["model"]["vocab"]
    content["model"]["vocab"] = [[unit[:2], score] for unit, score in units[:20]]
    (model / "tokenizer.json").write_text(json.dumps(content))
    settings = {"model": f"local-dir:{model}", "tuning_epochs": 1, "tuning_warmup_epochs": 0}
    with pytest.raises(ModelError, match="tune with --without mixture"):
        train(configure(added=("mixture",), **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(configure(**settings), tmp_path / "run")


def sentence_file(path: Path, text: str) -> str:
    path.write_text(json.dumps({"red ball|blue sky": {"difference": [text]}}))
    return str(path)


def test_a_run_that_has_its_sentences_keeps_their_sources_and_needs_them_no_more(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, run = sentence_file(tmp_path / "own.json", "One is round."), tmp_path / "run"
    few: dict[str, Any] = {
        "added": ("semantic-experts",),
        "tuning_epochs": 1,
        "tuning_warmup_epochs": 0,
    }
    train(configure(**few, confusion_sentences=own), run)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    Path(own).unlink()
    capsys.readouterr()
    train(configure(**few, confusion_sentences=own), run, resume=True)
    assert "its own" not in capsys.readouterr().err
    asking: dict[str, Any] = {
        "confusion_llm_url": "http://127.0.0.1:9/v1",
        "confusion_llm_model": "tiny",
    }
    for other in (
        {"confusion_sentences": sentence_file(tmp_path / "other.json", "One is blue.")},
        {"confusion_sentences": str(tmp_path / "nowhere.json")},
        {
            "confusion_sentences": own,
            "confusion_commonality": str(tmp_path / "nowhere.json"),
            "confusion_llm_retries": 7,
        },
        {"confusion_sentences": own, **asking},
    ):
        train(configure(**few, **other), run, resume=True)
        changed = [NAMES[name] for name, value in other.items() if value != own]
        told = f"note: the run keeps its sentences.json; not used: {', '.join(changed)}"
        assert capsys.readouterr().err.splitlines().count(told) == 1
        assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_until_a_run_has_its_sentences_their_sources_may_change_but_must_be_there(
    configure: Configure, tmp_path: Path
) -> None:
    own, run = sentence_file(tmp_path / "own.json", "One is round."), tmp_path / "run"
    few: dict[str, Any] = {
        "added": ("semantic-experts",),
        "tuning_epochs": 1,
        "tuning_warmup_epochs": 0,
    }
    train(configure(**few, confusion_sentences=own), run)
    for file in run.iterdir():  # as a kill leaves it that came before them
        if file.name not in ("config.json", "split.json"):
            file.unlink()
    with pytest.raises(DataError, match=r"nowhere\.json"):
        train(
            configure(**few, confusion_sentences=str(tmp_path / "nowhere.json")), run, resume=True
        )
    other = sentence_file(tmp_path / "other.json", "One is blue.")
    train(configure(**few, confusion_sentences=other), run, resume=True)
    assert read_config(run)[0].confusion.sentences == other
    texts = [
        text for kinds in read(run / "sentences.json").values() for text in kinds["difference"]
    ]
    assert "One is blue." in texts
    assert "One is round." not in texts
