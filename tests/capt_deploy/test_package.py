import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = Path(__file__).parents[2]


def run(code, *arguments):
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_no_module_of_the_runtime_imports_the_training_stack():
    code = """
import importlib, pkgutil, sys, capt_deploy
for module in pkgutil.walk_packages(capt_deploy.__path__, "capt_deploy."):
    importlib.import_module(module.name)
heavy = {"torch", "torchvision", "open_clip", "onnx", "capt_train", "export"} & set(sys.modules)
print(sorted(heavy), sum(name.startswith("capt_deploy.") for name in sys.modules))
"""
    heavy, modules = run(code).rsplit(" ", 1)
    assert heavy == "[]"
    assert int(modules) >= 18


def test_importing_the_package_is_light():
    assert run("import sys, capt_deploy; print('numpy' in sys.modules)") == "False"


def test_every_public_name_can_be_had():
    code = "import capt_deploy as c; print(all(getattr(c, name) for name in c.__all__))"
    assert run(code) == "True"


LIBRARIES = "import click, filelock, numpy, onnxruntime, PIL, safetensors, tqdm\n"
IS_3_10 = "import sys\nsys.exit(sys.version_info[:2] != (3, 10))"
EVERYTHING = """
import importlib, pkgutil, sys, capt_deploy
for module in pkgutil.walk_packages(capt_deploy.__path__, "capt_deploy."):
    importlib.import_module(module.name)
bundle, photo = sys.argv[1:]
print(capt_deploy.Classifier.load(bundle, "onnxruntime-cpu")(photo).label)
"""


def starts(python, code):
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_runtime_runs_on_the_python_of_jetpack_6():
    known = (ROOT / ".venv-deploy" / "bin" / "python", shutil.which("python3.10"), sys.executable)
    pythons = [p for p in known if p and Path(p).exists() and starts(p, LIBRARIES + IS_3_10)]
    if not pythons:
        pytest.skip("no Python 3.10 with the packages of the runtime is here; make test sets it up")
    paths = (GOLDEN / "tiny.capt", GOLDEN / "photos" / "test" / "blue_sky" / "0.png")
    words = [pythons[0], "-c", EVERYTHING, *paths]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == run(EVERYTHING, *paths) + "\n", done.stderr


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "open_clip", "onnx", "jaxtyping"):
    sys.modules[name] = None
from {module} import main
main({arguments})
"""


def call_without_torch(module, *arguments):
    code = WITHOUT_TORCH.format(module=module, arguments=[str(a) for a in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_bundle_is_evaluated_and_used_where_torch_is_missing():
    bundle, photos = GOLDEN / "tiny.capt", GOLDEN / "photos"
    done = call_without_torch("export.cli.eval", bundle, "--data", photos, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all"]["n"] == 3
    done = call_without_torch("capt_deploy.cli.predict", bundle, photos, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3


def test_what_needs_torch_says_how_to_install_it(tmp_path):
    cases = (
        (
            "capt_train.cli.train",
            "--data",
            GOLDEN / "photos",
            "--model",
            "x",
            "--out",
            tmp_path / "run",
        ),
        ("export.cli.export", tmp_path, "--out", tmp_path / "x.capt"),
        ("export.cli.eval", tmp_path, "--data", GOLDEN / "photos"),
    )
    for case in cases:
        done = call_without_torch(*case)
        assert done.returncode == 2
        assert "pip install '.[export]'" in done.stderr
        assert "Traceback" not in done.stderr
    done = call_without_torch("export.cli.eval", "typo.capt", "--data", GOLDEN / "photos")
    assert (done.returncode, done.stderr) == (2, "Error: typo.capt: no such run or bundle\n")
    assert list(tmp_path.iterdir()) == []
