import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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
