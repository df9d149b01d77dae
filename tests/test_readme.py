"""The commands and the code of the README run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a clone in which `make demo` has been run."""
    from examples.demo.world import write_world

    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    write_world(folder / "demo" / "pictograms")
    return folder


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def run(command, folder):
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": commands}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_commands_run_and_the_python_code_after_them(clone):
    (commands,), (code,) = blocks("bash"), blocks("python")
    lines = commands.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("capt-train", "capt-export", "capt-eval", "capt-predict")
    ]
    *_, predicted = (run(["bash", "-c", line], clone) for line in lines)
    printed = run([sys.executable, "-c", code], clone).stdout
    label, confidence = re.match(r"(.+) (0\.\d+|1\.0) \(", printed).groups()
    # the command before it was given the same picture
    assert f": {label} {float(confidence):.3f}" in predicted.stdout
    assert (clone / "report" / "report.html").is_file()


def test_it_fits_on_two_screens():
    assert len(README.splitlines()) <= 120
