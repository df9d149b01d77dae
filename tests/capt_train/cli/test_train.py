from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from capt_deploy.data.datasets import read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_train.cli.train import main
from capt_train.clip.backbone import Backbone
from capt_train.config import default_losses

HEAVY = {"torch", "numpy", "open_clip", "PIL", "onnxruntime", "safetensors"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(own) for own in arguments])


def test_it_tunes_and_shows_zero_shot_beside_tuned(base: list[str], tmp_path: Path) -> None:
    result = call(*base, "--classes", "base", "--method", "capt", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    chosen = ("map + rows", "logistic regression", "within one standard error")
    for text in (*chosen, "zero-shot", "tuned", "harmonic", "taken for", "time: loading "):
        assert text in result.stderr
    assert f"written to {tmp_path / 'run'}" in result.stderr


def test_json_prints_the_metrics_and_nothing_else_on_stdout(
    base: list[str], tmp_path: Path
) -> None:
    result = call(*base, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "run/metrics.json").read_text())


def test_every_option_reaches_the_configuration(base: list[str], tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"red_ball": "ball"}')
    result = call(
        *(*base, "--classes", "base", "--seed", 7, "--method", "coop", "--class-names", names),
        *(
            "--set",
            "prompt.depth=2",
            "--with",
            "mixture, text-prompts",
            "--without",
            "moments",
            "--without",
            "infonce",
        ),
        *(
            "--set",
            "prompt.words=this is",
            "--set",
            " losses.margin = 0.5",
            "--out",
            tmp_path / "run",
        ),
        *("--epochs", 4, "--lr", 0.01, "--batch-size", 5),
    )
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert config.items() >= {"classes": "base", "seed": 7, "method": "coop", "shots": 3}.items()
    assert config["prompt"].items() >= {"words": "this is", "depth": 2}.items()
    tuning = {"epochs": 4, "learning_rate": 0.01, "batch_size": 5}
    assert config["tuning"].items() >= tuning.items()
    assert config["losses"] == {**default_losses(), "margin": 0.5}
    assert config["added"] == ["mixture", "text-prompts"]
    assert config["without"] == ["moments", "infonce"]
    assert "ball" in json.loads((tmp_path / "run/split.json").read_text())["class_names"]


def test_resume_needs_no_other_option_and_refuses_others(base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(*base, "--method", "tcpt", "--out", run).exit_code == 0
    weights = (run / "best.safetensors").read_bytes()
    (run / "result.json").unlink()
    result = call("--resume", "--out", run)
    assert result.exit_code == 0, result.stderr
    assert (run / "best.safetensors").read_bytes() == weights
    for changed in (["--shots", "2"], ["--epochs", "9"]):
        result = call("--resume", "--out", run, *changed)
        assert result.exit_code == 2
        assert "was begun with other settings" in result.stderr


def test_split_from_reuses_the_images_of_a_run(
    inputs: list[str], finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = call(*inputs, "--split-from", finished, "--out", run, "--seed", 9)
    assert result.exit_code == 0, result.stderr
    assert (run / "split.json").read_bytes() == (finished / "split.json").read_bytes()
    config = json.loads((run / "config.json").read_text())["config"]
    assert config.items() >= {"classes": "base", "shots": 3, "seed": 9}.items()


@pytest.mark.parametrize(
    "arguments",
    [["--shots", 3], ["--classes", "base"], ["--set", "shots=9"], ["--set", "classes=all"]],
)
def test_split_from_with_a_choice_of_images_is_a_usage_error(
    arguments: list[object], inputs: list[str], finished: Path, tmp_path: Path
) -> None:
    result = call(*inputs, "--split-from", finished, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: --split-from brings its own --shots and --classes")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_moved_is_resumed_with_its_new_paths(
    base: list[str], photos: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert call(*base, "--method", "zeroshot", "--out", run).exit_code == 0
    shutil.copytree(photos, moved)
    result = call("--resume", "--data", moved, "--out", run)
    assert result.exit_code == 0, result.stderr
    assert json.loads((run / "config.json").read_text())["config"]["data"] == str(moved)


def test_one_epoch_needs_no_other_setting(base: list[str], tmp_path: Path) -> None:
    settings = ("--epochs", "1", "--with", "adapter", "--set", "visual.strength=1")
    result = call(*base, *settings, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    stages = json.loads((tmp_path / "run/result.json").read_text())["stages"]
    assert [stage["epochs"] for stage in stages] == [1, 1]


def test_tuning_that_made_it_worse_is_said(
    base: list[str], photos: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """Test images are labelled as the zero-shot model predicts them: it cannot be beaten."""
    dataset = read_dataset(photos)
    text = tiny_backbone.class_embeddings(dataset.class_names, ["a photo of a {}."])
    own = tmp_path / "photos"
    shutil.copytree(photos / "train", own / "train")
    for item in dataset.splits["test"]:
        pixels = np.stack([preprocess(dataset.path(item), tiny_backbone.preprocess)])
        image = tiny_backbone.image_embeddings(torch.from_numpy(pixels))
        name = dataset.class_names[int((image @ text.T).argmax())].replace(" ", "_")
        target = own / "test" / name / item.path.replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset.path(item), target)
    settings = [
        "tuning.epochs=20",
        "tuning.learning_rate=0.05",
        "prompt.class_specific=true",
        "tuning.patience=0",
    ]
    changes = [word for setting in settings for word in ("--set", setting)]
    result = call(*base, "--data", own, "--method", "coop", *changes, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "WARNING: tuned is less accurate than zero-shot on all classes" in result.stderr
    assert "< 100.0 %" in result.stderr


def assert_one_error_line(result: Result, expected: str) -> None:
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert expected in lines[-1]
    assert sum(line.startswith("Error: ") for line in lines) == 1
    assert result.stdout == ""


BAD = {
    "no data": (["--data", "nowhere"], "nowhere: no such folder"),
    "no model": (["--model", "local-dir:nowhere"], "cannot be loaded"),
    "no tag": (["--model", "ViT-B-16"], "pass --pretrained"),
    "unknown architecture": (["--model", "ViT-B-17", "--pretrained", "x"], "near: ViT-B-16"),
    "unknown tag": (["--model", "ViT-B-16", "--pretrained", "opnai"], "near: openai"),
    "weights that are not read": (["--pretrained", "openai"], "leave --pretrained out"),
    "no device": (["--device", "toaster"], "device 'toaster'"),
    "no shots": (["--shots", "0"], "--shots: expected all or 1 or more, came 0"),
    "huge seed": (["--seed", str(10**30)], "--seed: expected"),
    "unknown setting": (["--set", "epoch=3"], "no setting 'epoch'; did you mean tuning.epochs?"),
    "setting of another type": (
        ["--set", "visual.epochs=many"],
        "expected a whole number, came 'many'",
    ),
    "setting without value": (["--set", "tuning.epochs"], "expected NAME=VALUE"),
    "weight that is no number": (
        ["--set", "losses.moments=nan"],
        "losses.moments: expected 0 or more",
    ),
    "infinite rate": (["--lr", "inf"], "--lr (--set tuning.learning_rate): expected"),
    "no class names": (["--class-names", "nowhere.json"], "nowhere.json"),
    "template without a place": (["--template", "a photo"], "--template: expected"),
    "no split": (["--split-from", "nowhere"], "nowhere"),
    "long context": (["--set", "prompt.random_tokens=99"], "too long for the model's 16 tokens"),
    "nothing to resume": (["--resume"], "config.json is missing"),
    "unknown method": (["--method", "magic"], "magic"),
    "unknown part": (
        ["--without", "adapters"],
        "--without: no part 'adapters'; did you mean adapter?",
    ),
    "no sentences": (
        ["--with", "semantic-experts", "--sentences", "nowhere.json"],
        "nowhere.json",
    ),
    "sentences that nothing reads": (
        ["--sentences", "x.json"],
        "--sentences (--set confusion.sentences): nothing reads",
    ),
    "no address of an LLM": (["--llm-model", "tiny"], "--llm-model: expected --llm-url beside it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_line_and_exit_code_2_and_leaves_nothing(
    case: str, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    assert_one_error_line(call(*inputs, *arguments, "--out", "run"), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file/run", "file/deep/run"])
def test_a_folder_that_cannot_be_made_is_one_error_line(
    out: str, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert_one_error_line(call(*base, "--method", "zeroshot", "--out", out), "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_data_and_model_must_be_given(tmp_path: Path) -> None:
    result = call("--out", tmp_path / "run", "--model", "ViT-B-16")
    assert result.exit_code == 2
    assert "missing option --data" in result.stderr


def test_an_existing_run_is_not_overwritten(base: list[str], finished: Path) -> None:
    before = (finished / "config.json").stat().st_mtime_ns
    result = call(*base, "--out", finished)
    assert result.exit_code == 2
    assert "continue it with --resume" in result.stderr
    assert (finished / "config.json").stat().st_mtime_ns == before


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from capt_train.cli.train import main;"
        "main(['--help'], standalone_mode=False); "
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "--resume" in done.stdout
    assert done.stderr.strip() == "[]"
