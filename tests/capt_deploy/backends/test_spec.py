"""A new backend is one file, `dummy.py`, and one entry, `DUMMY`: everything else finds it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from capt_deploy import Classifier
from capt_deploy.backends import spec as spec_module
from capt_deploy.backends.base import Backend
from capt_deploy.backends.spec import BACKENDS, BackendSpec, backend_names
from capt_deploy.cli import bench, doctor, predict
from capt_deploy.core.errors import UnavailableError
from capt_deploy.core.gpus import gpu_problem
from capt_deploy.core.machine import versions

pytest.importorskip("onnx", reason="the dummy runs graphs with it")
GOLDEN = Path(__file__).parents[2] / "golden"
PHOTOS = sorted((GOLDEN / "photos").rglob("*.png"))
DUMMY = BackendSpec(
    name="dummy",
    module="onnx",
    packages=("onnx",),
    extra="export",
    factory="tests.capt_deploy.backends.dummy:Dummy",
    precisions=("fp32",),
)
# `capt-doctor` tries backends in processes of their own, which get the entry like this.
SITE = """
from capt_deploy.backends import spec
spec.BACKENDS = (spec.BackendSpec(**{fields!r}), *spec.BACKENDS)
"""


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "BACKENDS", (DUMMY, *BACKENDS))


def run(command: object, *arguments: object) -> str:
    result = CliRunner().invoke(command.main, [*map(str, arguments)])  # type: ignore[attr-defined]
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("entry")
def test_a_classifier_runs_on_it() -> None:
    with (
        Classifier.load(GOLDEN / "tiny.capt", "dummy") as classifier,
        Classifier.load(GOLDEN / "tiny.capt", "onnxruntime-cpu") as reference,
    ):
        assert classifier.backend.name == "dummy"
        assert isinstance(classifier.backend, Backend)
        for found, expected in zip(
            classifier.predict(PHOTOS), reference.predict(PHOTOS), strict=True
        ):
            assert found.label == expected.label
            np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)


@pytest.mark.usefixtures("entry")
@pytest.mark.skipif(gpu_problem() is None, reason="a backend on the GPU is taken unmeasured")
def test_auto_measures_it_beside_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Classifier.load(GOLDEN / "tiny.capt"):
        assert "dummy fp32, " in caplog.text


@pytest.mark.usefixtures("entry")
def test_predict_knows_it() -> None:
    text = run(predict, GOLDEN / "tiny.capt", PHOTOS[0], "--backend", "dummy", "--json")
    expected = run(predict, GOLDEN / "tiny.capt", PHOTOS[0], "--backend", "onnxruntime", "--json")
    assert json.loads(text)[0]["label"] == json.loads(expected)[0]["label"]


@pytest.mark.usefixtures("entry")
def test_bench_measures_it_by_name_and_among_all() -> None:
    quick = ("--batch", 1, "--scope", "host", "--seconds", 0.1, "--json")
    rows = json.loads(run(bench, GOLDEN / "tiny.capt", "--backend", "dummy", *quick))
    assert [(row["backend"], row["device"]) for row in rows] == [("dummy", "cpu")]
    assert "onnx" in rows[0]["versions"]
    rows = json.loads(run(bench, GOLDEN / "tiny.capt", "--backend", "all", *quick))
    assert "dummy" in {row["backend"] for row in rows}


def test_doctor_tries_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: None) -> None:
    fields = {name: getattr(DUMMY, name) for name in DUMMY.__dataclass_fields__}
    (tmp_path / "sitecustomize.py").write_text(SITE.format(fields=fields))
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    diagnosis = json.loads(run(doctor, "--json"))
    first = diagnosis["backends"][0]
    assert (first["name"], first["usable"], first["device"]) == ("dummy", True, "cpu"), first
    assert diagnosis["chosen"] == "dummy"


@pytest.mark.usefixtures("entry")
def test_its_name_is_known_and_its_library_is_listed() -> None:
    assert backend_names()[:2] == ("auto", "dummy")
    assert "onnx" in versions(spec_module.library_packages())


def test_a_missing_library_is_named_with_the_fix() -> None:
    missing = replace(DUMMY, module="no_such_library", packages=("no-such-library",))
    with pytest.raises(UnavailableError, match=r"backend dummy: .*no_such_library.*\[export\]"):
        missing.open(b"", "fp32")
    assert "[export]" in missing.fix({}, ())
    assert "--force-reinstall no-such" in missing.fix({"no-such-library": "1"}, ())


def test_every_entry_names_what_exists() -> None:
    for spec in BACKENDS:
        for reference in filter(None, (spec.factory, spec.check, spec.advice)):
            assert callable(spec_module._resolve(reference)), reference


def test_the_table_imports_neither_numpy_nor_any_library() -> None:
    code = "import sys, capt_deploy.backends.spec\n"
    code += "print({'numpy', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
