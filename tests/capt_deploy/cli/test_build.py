import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_deploy.backends.tensorrt.cache import LIMIT
from capt_deploy.cli.build import main
from capt_deploy.core.gpus import gpu_problem

builds = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed here"
)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "engines"


@builds
def test_an_engine_for_another_gpu_is_built_once(golden, cache):
    options = (golden, "--backend", "tensorrt-rtx", "--sm", "89", "--cache", cache)
    first = json.loads(run(*options, "--json").stdout)
    again = json.loads(run(*options, "--json").stdout)
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["path"] == again["path"]
    assert Path(first["path"]).parent == cache
    assert Path(first["path"]).stat().st_size > first["bytes"] > 100_000
    assert first["key"]["sm"] == 89
    assert first["key"]["batches"] == [1, 8, 32]
    text = run(*options)
    assert (text.exit_code, "was there already" in text.stdout) == (0, True)


@builds
def test_the_cache_is_listed_and_pruned(golden, cache, monkeypatch):
    empty = run("--list", "--cache", cache)
    assert (empty.exit_code, "holds no engine" in empty.stdout) == (0, True)
    for batch in ("1", "1,2,4"):
        sm = ("--sm", "120", "--batch", batch)
        assert run(golden, "--backend", "tensorrt-rtx", *sm, "--cache", cache).exit_code == 0
    (cache / f"engine-{'0' * 32}.entry").write_text("broken")
    lines = run("--list", "--cache", cache).stdout.splitlines()
    assert len(lines) == 5
    assert sum("damaged" in line for line in lines) == 1
    rows = json.loads(run("--list", "--cache", cache, "--json").stdout)["entries"]
    batches = [row["key"]["batches"] for row in rows if not row["damaged"]]
    assert sorted(batches) == [[1, 1, 1], [1, 2, 4]]
    removed = json.loads(run("--prune", "--cache", cache, "--json").stdout)["removed"]
    assert removed == {"entries": 1, "bytes": 6}
    monkeypatch.setenv(LIMIT, "0")
    assert run("--prune", "--cache", cache).exit_code == 0
    assert list(cache.iterdir()) == []


@builds
@pytest.mark.skipif(gpu_problem() is None, reason="a GPU is here")
def test_without_a_gpu_the_message_says_what_can_be_built(golden, cache):
    result = run(golden, "--backend", "tensorrt-rtx", "--cache", cache)
    assert result.exit_code == 2
    assert "or name another machine's GPU with --sm" in result.stderr
    assert "Traceback" not in result.stderr


@builds
def test_an_engine_that_cannot_be_kept_is_an_error(golden, tmp_path):
    (tmp_path / "file").touch()
    options = ("--backend", "tensorrt-rtx", "--sm", "89", "--cache", tmp_path / "file" / "x")
    result = run(golden, *options)
    assert result.exit_code == 2
    assert "built but could not be kept" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected BUNDLE and --backend"),
        (("x.capt",), "expected BUNDLE and --backend"),
        (("x.capt", "--list"), "leave BUNDLE out"),
        (("x.capt", "--backend", "tensorrt-rtx", "--batch", "8,1"), "smallest ≤ usual ≤ largest"),
        (("x.capt", "--backend", "tensorrt-rtx", "--batch", "eight"), "smallest ≤ usual ≤ largest"),
        (("x.capt", "--backend", "tensorrt-rtx", "--sm", "x"), "not a valid integer"),
        (("x.capt", "--backend", "onnxruntime"), "is not one of"),
        (("x.capt", "--backend", "tensorrt-rtx"), "no such bundle"),
    ],
)
def test_bad_input_is_one_error_with_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@builds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sm", "90"), "SM 90 is not one of"),
        (("--sm", "89", "--precision", "fp4"), "no 'fp4' graph"),
        (("--sm", "89", "--portable", "version"), "every engine of tensorrt-rtx is portable"),
    ],
)
def test_what_cannot_be_built_is_one_error(golden, cache, arguments, message):
    result = run(golden, "--backend", "tensorrt-rtx", "--cache", cache, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_a_missing_library_says_how_to_install_it(golden, cache, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
        backend = name.replace("_", "-")
        result = run(golden, "--backend", backend, "--sm", "89", "--cache", cache)
        assert result.exit_code == 2
        assert f"pip install '.[{backend}]'" in result.stderr


@builds
def test_a_changed_bundle_is_refused(golden, cache, tmp_path):
    bundle = tmp_path / "changed.capt"
    shutil.copytree(golden, bundle)
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    result = run(bundle, "--backend", "tensorrt-rtx", "--sm", "89", "--cache", cache)
    assert (result.exit_code, "is not the file that was exported" in result.stderr) == (2, True)


@builds
def test_a_lone_graph_has_the_engine_of_its_bundle(golden, cache):
    options = ("--backend", "tensorrt-rtx", "--sm", "89", "--cache", cache, "--json")
    alone = run(golden / "model.onnx", *options)
    assert alone.exit_code == 0, alone.stderr
    again = json.loads(run(golden, *options).stdout)
    assert again["cached"]
    assert again["path"] == json.loads(alone.stdout)["path"]


def change_manifest(golden, folder, **changes):
    bundle = folder / "changed.capt"
    shutil.copytree(golden, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))
    return bundle


def test_a_changed_manifest_is_refused(golden, cache, tmp_path):
    classes = json.loads((golden / "manifest.json").read_text())["class_names"][::-1]
    bundle = change_manifest(golden, tmp_path, class_names=classes)
    result = run(bundle, "--backend", "tensorrt-rtx", "--sm", "89", "--cache", cache)
    assert (result.exit_code, "its manifest was changed" in result.stderr) == (2, True)


def test_a_bundle_whose_check_had_failed_is_warned_of(golden, cache, tmp_path):
    bundle = change_manifest(golden, tmp_path, verified=False)
    with pytest.warns(UserWarning, match="although its check had failed"):
        run(bundle, "--backend", "tensorrt-rtx", "--sm", "89", "--cache", cache)


def test_help_needs_no_library():
    code = "import sys\nfrom capt_deploy.cli.build import main\n"
    code += "main(['--help'], standalone_mode=False)\n"
    code += "print(sorted({'numpy', 'tensorrt_rtx', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Example:" in done.stdout
    assert done.stdout.endswith("[]\n")
