"""Real processes that torchrun starts; on CPUs they talk by gloo."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capt_train import parallel
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.tune.epochs import Epochs

ROOT = Path(__file__).parents[2]
# Every part and loss, epochs of the text side and of the visual side, and uneven shares: three
# classes, and batches of five images.
SETTINGS: dict[str, Any] = {
    "method": "full",
    "shots": 4,
    "tuning_epochs": 3,
    "visual_epochs": 2,
    # AdamW makes steps of any gradient, also of one that is only rounding
    "tuning_optimizer": "sgd",
    "tuning_learning_rate": 0.5,
    "visual_learning_rate": 0.05,
    "visual_batch_size": 5,
    "visual_views": 3,
    "visual_strength": "0.75",
    "map_side": "classes",
    "map_ridge": 0.003,
    "rows_weight": 0.2,
}


# capt-train, which tunes two more runs before its own, as imports take most of the time.
SEVERAL = """
import pickle
import sys
from pathlib import Path
from capt_train import pipeline
from capt_train.cli.train import main

plain, folder = pipeline.train, Path(sys.argv.pop(1))

def train(*arguments, **options):
    for name, config in pickle.loads((folder / "configs.pickle").read_bytes()).items():
        plain(config, folder / name)
    return plain(*arguments, **options)

pipeline.train = train
main()
"""
# Photos choose the parts, which are fitted in closed form; and prompts that read images which are
# trained as well.
SHORT = {"device": "cpu", "tuning_epochs": 2, "tuning_warmup_epochs": 1, "tuning_optimizer": "sgd"}
FRESH: dict[str, dict[str, Any]] = {
    "default": {**SHORT, "method": "capt", "shots": 2, "map_side": "classes", "map_ridge": 0.1},
    "joint": {
        **SHORT,
        "method": "cocoop",
        "added": ("visual-lora",),
        "tuning_learning_rate": 0.5,
        "visual_joint": True,
        "visual_views": 2,
        "shots": 2,
    },
}

# The second process has an error that the first, which waits for it, does not know.
FAILING = """
import click
from capt_deploy.core.console import Command
from capt_deploy.core.errors import RunError
from capt_train import parallel

@click.command(cls=Command)
def main():
    with parallel.processes():
        if not parallel.is_first():
            raise RunError("nobody else has this error")
        parallel.gather_items("waiting")

main()
"""


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Start two processes of a Python program, and wait for them."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


@pytest.fixture(scope="module")
def single(
    configure: Callable[..., TrainConfig], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path, dict[str, Any]]:
    """Return the settings, the folder and the report of a run by one process."""
    three = tmp_path_factory.mktemp("three") / "photos"
    shutil.copytree(photos, three, ignore=shutil.ignore_patterns("red_ball"))
    config, run = configure(data=str(three), **SETTINGS), three.parent / "run"
    return config, run, train(config, run)


def assert_alike(run: Path, expected: Path, epochs: list[int]) -> None:
    """Check every loss term and the validation loss of each epoch of each stage."""
    stages, others = (
        json.loads((folder / "result.json").read_text())["stages"] for folder in (run, expected)
    )
    assert [stage["epochs"] for stage in stages] == epochs
    for stage, other in zip(stages, others, strict=True):
        for terms, wanted in zip(stage["history"], other["history"], strict=True):
            # Mostly within 1e-6; a step of SGD may carry a rounding further.
            assert terms == pytest.approx(wanted, abs=1e-5, rel=1e-4)


def test_two_processes_begin_and_continue_as_one_does_and_one_continues_what_two_have_written(
    configure: Callable[..., TrainConfig],
    single: tuple[TrainConfig, Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, run, report = single
    out = tmp_path / "run"

    def interrupted(loop: Epochs, number: int) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(loop, number)

    epoch = Epochs.epoch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Epochs, "epoch", interrupted)
        train(config, out)

    program = tmp_path / "several.py"
    program.write_text(SEVERAL)
    configs = {name: configure(data=config.data, **values) for name, values in FRESH.items()}
    (tmp_path / "configs.pickle").write_bytes(pickle.dumps(configs))
    done = torchrun(program, tmp_path, "--resume", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run written to") == 1
    metrics = json.loads(done.stdout)  # once
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["all"]["accuracy"] == report["all"]["accuracy"]
    assert {file.name for file in out.iterdir()} == {file.name for file in run.iterdir()}
    assert_alike(out, run, [3, 2])

    for name, values in configs.items():
        alone, together = tmp_path / f"{name} alone", tmp_path / name
        report = train(values, alone)
        assert json.loads((together / "metrics.json").read_text())["all"] == pytest.approx(
            report["all"], abs=1e-4
        )
        assert_alike(together, alone, [2] if name == "joint" else [])
        if name == "default":
            chosen = [json.loads((f / "choice.json").read_text()) for f in (together, alone)]
            assert chosen[0]["chosen"] == chosen[1]["chosen"]

    for name in ("result.json", "best.safetensors", "last.safetensors"):
        (out / name).unlink()  # what is left is the text side
    again = train(config, out, resume=True)
    assert again["all"]["accuracy"] == metrics["all"]["accuracy"]
    assert_alike(out, run, [3, 2])


def test_the_error_of_one_process_ends_all_with_one_message(tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    done = torchrun(program)
    assert done.returncode
    lines = done.stderr.splitlines()
    assert lines.count("Error: nobody else has this error") == 1, done.stderr
    assert not [line for line in lines if line.startswith("RuntimeError")]
    assert "exitcode  : 2" in done.stderr  # as torchrun reports it


def test_a_single_process_keeps_what_it_is_given() -> None:
    rows, encoded = [3, 1, 2], torch.ones(3, 2, requires_grad=True)
    assert parallel.split_items(rows, 2) == rows
    assert parallel.split_rows(rows) is rows
    assert parallel.gather_rows(encoded, 3) is encoded
    assert parallel.averaged([encoded]) == [encoded]
    assert parallel.gather_items(rows) == [rows]
    assert parallel.by_first(lambda: rows) is rows
    with parallel.processes():
        assert parallel.count() == 1
