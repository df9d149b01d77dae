"""Real processes that are killed, interrupted, or meet in one run folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.core.errors import RunError
from capt_train.cli.train import main
from capt_train.config import TrainConfig
from capt_train.pipeline import train
from capt_train.run.setup import locked
from tests.configs import NAMES

# Where the tests themselves run in the background, a child would ignore Ctrl-C.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from capt_train.cli.train import main; main()"
)
HOLD = (
    "import sys, time; from pathlib import Path; from capt_train.run.setup import locked\n"
    "with locked(Path(sys.argv[1])):\n"
    "    print('locked', flush=True)\n"
    "    time.sleep(60)\n"
)
CHECKPOINTS = ("best.safetensors", "last.safetensors")
BUSY = "another capt-train is writing this run"


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run another process that has locked `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("added", "optimizer", "how"),
    [
        (("infonce", "adapter"), "adamw", signal.SIGKILL),
        (("margin", "moments"), "sgd", signal.SIGINT),
    ],
)
def test_a_stopped_run_resumes_to_the_bits_of_an_uninterrupted_one(
    added: tuple[str, ...],
    optimizer: str,
    how: signal.Signals,
    configure: Callable[..., TrainConfig],
    base: list[str],
    tmp_path: Path,
) -> None:
    settings = {
        "method": "coop",
        "tuning_epochs": 40,
        "tuning_patience": 0,
        "tuning_optimizer": optimizer,
    }
    settings |= {
        "tuning_batch_size": 6,
        "visual_epochs": 20,
        "visual_views": 2,
        "visual_strength": "1",
    }
    if "adapter" in added:  # the text side is interrupted elsewhere
        settings["tuning_epochs"] = 2
    train(configure(added=added, **settings), tmp_path / "whole")
    run = tmp_path / "stopped"
    changes = ["--with", ",".join(added)]
    changes += [word for k, v in settings.items() for word in ("--set", f"{NAMES[k]}={v}")]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *base, *changes, "--out", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "last.safetensors").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert stdout == ""
    if how == signal.SIGINT:
        assert process.returncode == 130
        advice = f"to continue where it stopped: capt-train --resume --out {run}"
        assert stderr.splitlines()[-2:] == [advice, "interrupted"]
        assert "Traceback" not in stderr
    else:
        assert process.returncode == -signal.SIGKILL
    assert (run / "last.safetensors").exists()
    assert not (run / "result.json").exists()
    names = [*CHECKPOINTS, *(["bank.safetensors"] if "infonce" in added else [])]
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    assert (run / "last.safetensors").read_bytes() != whole["last.safetensors"]
    result = CliRunner().invoke(main, ["--resume", "--out", str(run)])
    assert result.exit_code == 0, result.stderr
    assert {name: (run / name).read_bytes() for name in names} == whole


def test_two_processes_never_write_one_run_and_a_kill_sets_it_free(
    configure: Callable[..., TrainConfig], base: list[str], tmp_path: Path
) -> None:
    run, config = tmp_path / "run", configure(method="zeroshot")
    with holder(run) as other:
        with pytest.raises(RunError, match=f"run: {BUSY}"):
            train(config, run)
        result = CliRunner().invoke(main, [*base, "--out", str(run)])
        assert result.exit_code == 2
        assert result.stderr == f"Error: {run}: {BUSY}\n"
        assert not run.exists()
        train(config, tmp_path / "another")
        other.send_signal(signal.SIGKILL)
        assert other.wait(10) == -signal.SIGKILL
        train(config, run)
    assert (run / "metrics.json").exists()


def test_a_resumed_run_is_locked_like_a_new_one(
    configure: Callable[..., TrainConfig], finished: Path
) -> None:
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    with locked(finished), pytest.raises(RunError, match=BUSY):
        train(configure(classes="base"), finished, resume=True)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_a_relative_path_locks_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "run"), pytest.raises(RunError, match=BUSY), locked(Path("run")):
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    other = tmp_path / "link" / "run"
    with locked(tmp_path / "run"), pytest.raises(RunError, match=BUSY), locked(other):
        pass


def test_a_run_is_free_again_when_its_tuning_ends_or_fails(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        train(configure(), tmp_path / "run", resume=True)
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        raise ZeroDivisionError
    with locked(tmp_path / "run"):
        assert list(tmp_path.iterdir()) == []  # the lock lies elsewhere
