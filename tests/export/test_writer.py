import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from capt_deploy.bundle import open_bundle
from capt_deploy.errors import BundleError, DataError, GateError, RunError
from capt_deploy.gate import LIMITS
from capt_train.run import load_run
from export.writer import export_run


def test_the_bundle_holds_what_its_manifest_lists(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    on_disk = {file.name for file in bundle.iterdir()} - {"manifest.json"}
    rows = {"text_embeddings.safetensors", "reference.safetensors"}
    assert on_disk == {"model.onnx", "report.json", *rows}
    assert set(manifest["files"]) == on_disk
    for name, record in manifest["files"].items():
        data = (bundle / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_it_remembers_classes_calibration_and_where_it_came_from(bundle, tuned_run):
    model, manifest = load_run(tuned_run), open_bundle(bundle).manifest
    assert manifest.class_names == ("blue sky", "green leaf", "grey stone", "red ball")
    assert manifest.tuned == (True, True, False, False)
    # its embeddings are not the frozen model's, so there is nothing to calibrate that with
    assert manifest.calibration == {"fp32": {"temperature": model.fitted.temperature}}
    assert manifest.training["data_fingerprint"] == model.split.fingerprint()
    assert {"seed", "shots", "method", "versions", "model_sha256"} <= set(manifest.training)
    counted = {(p["true"], p["predicted"]): p["count"] for p in manifest.confusion_pairs}
    names = model.class_names
    assert counted == {(names[a], names[b]): n for (a, b), n in model.fitted.pairs.items()}


def test_rows_for_tools_are_the_graphs_own(bundle):
    rows = load_file(bundle / "text_embeddings.safetensors")
    assert {name: array.shape for name, array in rows.items()} == {
        "text_embeddings": (4, 32),
        "bias": (4,),
    }


def test_no_folder_of_this_machine_is_in_the_bundle(bundle, tuned_run, photos):
    for file in bundle.iterdir():
        for folder in (photos, tuned_run):
            assert str(folder).encode() not in file.read_bytes()


def test_the_report_holds_the_gates_figures(bundle):
    report = json.loads((bundle / "report.json").read_text())
    assert report["gate"]["fp32"]["passed"] is True
    assert report["gate"]["fp32"]["images"] == 8  # all validation images of the tuned classes
    assert report["graphs"]["fp32"]["nodes"] > 0


def test_nothing_is_overwritten(bundle, tuned_run):
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="already there"):
        export_run(tuned_run, bundle)
    assert (bundle / "manifest.json").read_bytes() == before


def with_impossible_limits(monkeypatch):
    impossible = replace(LIMITS["fp32"], max_probability_difference=-1.0)
    monkeypatch.setitem(LIMITS, "fp32", impossible)


def test_a_failing_gate_writes_nothing(tuned_run, tmp_path, monkeypatch):
    with_impossible_limits(monkeypatch)
    with pytest.raises(GateError, match="max probability difference"):
        export_run(tuned_run, tmp_path / "x.capt")
    assert list(tmp_path.iterdir()) == []


def test_a_moved_data_set_can_be_pointed_to(tuned_run, photos, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(tuned_run, run)
    shutil.copytree(photos, moved)
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(photos), "/gone"))
    with pytest.raises(DataError, match="--gate-data"):
        export_run(run, tmp_path / "a.capt")
    export_run(run, tmp_path / "b.capt", gate_data=moved)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b.capt", "elsewhere", "run"]


def test_a_home_in_the_path_is_understood(tuned_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export_run(tuned_run, "~/x.capt")
    assert (tmp_path / "x.capt" / "manifest.json").is_file()


def test_an_unfinished_run_is_refused(tuned_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned_run, run)
    (run / "result.json").unlink()
    with pytest.raises(RunError, match="--resume"):
        export_run(run, tmp_path / "x.capt")
    with pytest.raises(RunError, match="no run"):
        export_run(tmp_path, tmp_path / "x.capt")
