import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.cli.doctor import main
from capt_deploy.core.gpus import gpu_problem

GOLDEN = Path(__file__).parents[2] / "golden"


def run(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_the_text_says_what_works_and_what_would_make_the_rest_work():
    result = run(GOLDEN / "tiny.capt")
    assert result.exit_code == 0, result.output
    assert "onnxruntime-cpu   works on cpu" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("auto takes ")
    assert result.stdout.count(" no: ") == result.stdout.count(" fix: ")
    assert "python 3." in result.stdout


def test_a_jetson_is_named(monkeypatch):
    monkeypatch.setattr("capt_deploy.doctor.diagnose.jetson_linux", lambda: "36.4.3")
    monkeypatch.setattr("capt_deploy.core.jetson.jetson_linux", lambda root=None: "36.4.3")
    assert "Jetson     Jetson Linux 36.4.3, JetPack 6\n" in run().stdout


def test_json_can_be_read_by_a_program():
    result = run("--json")
    assert result.exit_code == 0, result.output
    diagnosis = json.loads(result.stdout)
    keys = {"versions", "machine", "driver", "problems", "backends", "chosen", "measured"}
    assert diagnosis.keys() == keys
    assert diagnosis["backends"][-1]["name"] == "onnxruntime-cpu"
    assert diagnosis["backends"][-1]["usable"] is True


@pytest.mark.parametrize("argument", ["nowhere.capt", GOLDEN / "photos"])
def test_bad_input_is_one_line_and_exit_code_2(argument):
    result = run(argument)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output


@pytest.mark.skipif(gpu_problem() is None, reason="a backend on the GPU may work")
def test_the_exit_code_is_1_where_no_backend_works(tmp_path):
    for name in ("onnxruntime", "openvino"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", "from capt_deploy.cli.doctor import main; main()"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "problem: no backend works: pip install" in done.stdout
    assert done.stdout.endswith("auto takes none\n")


def test_torch_is_looked_up_and_never_imported():
    code = """
import sys
from capt_deploy.cli.doctor import main
main(["--json"], standalone_mode=False)
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
