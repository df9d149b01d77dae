"""What docs/embedding.md shows is run as it is written, and what it names is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.cli import bench, predict
from examples import edge_camera
from examples.server import __main__ as server
from export.cli import export

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "embedding.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def test_the_code_runs_and_prints_what_is_shown(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "pictograms.capt")
    shutil.copy(golden.parent / "photos" / "test" / "blue_sky" / "0.png", tmp_path / "photo.png")
    code = "\n".join(blocks("python"))
    command = [sys.executable, "-c", code]
    own = {**os.environ, "PYTHONPATH": str(ROOT)}  # not another installed version
    done = subprocess.run(
        command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = {form(line) for line in done.stdout.splitlines()}
    shown = [form(line) for text in blocks("text") for line in text.splitlines() if line != "…"]
    assert len(shown) == 5
    on_this_machine = [line for line in shown if not line.startswith("not tensorrt")]
    assert [line for line in on_this_machine if line not in printed] == []


def form(line: str) -> str:
    """Return a line without figures and without the classes, which are another bundle's here."""
    classes = r"blue sky|green leaf|grey stone|red ball|plain red circle|plain orange circle"
    return re.sub(r"[\d.]*\d", "0", re.sub(classes, "CLASS", line))


def test_the_shown_answers_and_options_are_the_programs_own() -> None:
    others = {"--preload", "--name", "--docs", "--without", "--classes", "--model", "--bundle"}
    others |= {"--no-compile"}  # of a benchmark
    options = {*re.findall(r"--[a-z][a-z0-9-]+", DOCS)} - others
    programs = (server, edge_camera, predict, bench, export)
    helped = "".join(CliRunner().invoke(one.main, ["--help"]).output for one in programs)
    assert sorted(option for option in options if f"{option} " not in helped) == []
    answer, line = blocks("json")
    assert answer.startswith('{"predictions":[{"label":')
    assert [*re.findall(r'"(\w+)":', line)] == [
        *("frame", "label", "confidence", "unsure", "latency_ms", "dropped")
    ]


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", DOCS))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).is_file()
