import hashlib
import json
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DataError,
    GateError,
    RunError,
)
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.gate import LIMITS
from capt_train.run.folder import load_run
from export.graph import onnx_graph
from export.graph.visual import VisualClassifier
from export.writer import ExportOptions, export_run


def test_the_bundle_holds_what_its_manifest_lists(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    on_disk = {file.name for file in bundle.iterdir()} - {"manifest.json"}
    rows = {"text_embeddings.safetensors", "reference.safetensors"}
    assert on_disk == {"model.onnx", "report.json", "README.txt", *rows}
    listed = (bundle / "README.txt").read_text()
    names = {"manifest.json", *on_disk} - {"README.txt"}
    assert all(f"\n{name} " in listed for name in names)
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


def test_a_lone_graph_that_was_changed_is_refused(bundle, tmp_path):
    content = (bundle / "model.onnx").read_bytes()
    lone = tmp_path / "model.onnx"
    lone.write_bytes(content)
    pixels = np.full((16, 16, 3), 90, np.uint8)
    with Classifier.load(lone, "onnxruntime-cpu") as classifier:
        assert classifier(pixels).label in classifier.class_names
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), 200):
        changed = bytearray(content)
        changed[place] ^= 1 << random.integers(8)
        lone.write_bytes(changed)
        with pytest.raises(BundleError, match=r"model\.onnx"):
            open_bundle(lone)


def test_a_name_that_ends_in_zip_gives_a_zip_of_the_same_bundle(bundle, tuned_run, tmp_path):
    written = export_run(tuned_run, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == [written]
    found, expected = open_bundle(written), open_bundle(bundle)
    assert found.manifest.files.keys() == expected.manifest.files.keys()
    assert found.graph("fp32").onnx == expected.graph("fp32").onnx
    with pytest.raises(BundleError, match="already exists"):
        export_run(tuned_run, tmp_path / "x.zip")


def test_a_path_that_no_runtime_can_open_is_refused_at_once(tuned_run, tmp_path):
    with pytest.raises(BundleError, match="expected a path in UTF-8"):
        export_run(tuned_run, tmp_path / "caf\udce9.capt")
    assert not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(bundle, tuned_run):
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="already exists"):
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


@pytest.fixture(scope="module")
def manifest(full_bundle):
    return open_bundle(full_bundle).manifest


def test_several_precisions_share_a_bundle_and_the_first_has_the_usual_name(full_bundle, manifest):
    files = {precision: graph.file for precision, graph in manifest.graphs.items()}
    assert files == {
        "fp32": "model.onnx",
        "fp16": "model.fp16.onnx",
        "bf16": "model.bf16.onnx",
        "int8": "model.int8.onnx",
        "int8-cpu": "model.int8-cpu.onnx",
    }
    sizes = [(full_bundle / file).stat().st_size for file in files.values()]
    assert 0.45 < sizes[1] / sizes[0] < 0.95 and sizes[1] == pytest.approx(sizes[2], rel=0.05)
    report = json.loads((full_bundle / "report.json").read_text())
    assert set(report["gate"]) == set(report["graphs"]) == set(files)
    assert all(gate["passed"] for gate in report["gate"].values())
    assert "emulated" in report["graphs"]["bf16"]["asked"]
    assert report["graphs"]["int8"]["int8"]["work"] > 0.5
    assert report["graphs"]["int8"]["int8"]["images"] == 8  # four of each tuned class, to tune on


def test_each_precision_has_a_temperature_of_its_own(manifest, tuned_run):
    fitted = load_run(tuned_run).fitted.temperature
    found = {name: own["temperature"] for name, own in manifest.calibration.items()}
    assert found["fp32"] == fitted
    assert found["bf16"] == pytest.approx(fitted, rel=0.05)


def test_the_runtime_picks_what_runs_here_and_others_on_request(full_bundle):
    assert Classifier.load(full_bundle, "onnxruntime").precision == "fp32"
    assert Classifier.load(full_bundle).precision in ("fp32", "bf16", "int8-cpu")  # the fastest
    assert Classifier.load(full_bundle, precision="fp16").precision == "fp16"
    with pytest.raises(BackendError, match="bfloat16"):
        Classifier.load(full_bundle, "onnxruntime", "bf16")
    alone = Classifier.load(full_bundle / "model.fp16.onnx")
    assert alone.precision == "fp16"


def test_a_graph_that_is_too_sure_gets_another_temperature_into_its_head(
    tuned_run, tmp_path, monkeypatch
):
    plain = VisualClassifier.lower

    def surer(self, dtype):
        plain(self, dtype)
        self.weight *= 1.3
        self.bias *= 1.3

    monkeypatch.setattr(VisualClassifier, "lower", surer)
    options = ExportOptions(precisions=("fp16",), force=True)  # what a head does is put right twice
    out = export_run(tuned_run, tmp_path / "x.capt", options=options)
    bundle, model = open_bundle(out), load_run(tuned_run)
    temperature = bundle.manifest.calibration["fp16"]["temperature"]
    assert temperature == pytest.approx(1.3 * model.fitted.temperature, rel=0.01)
    rows = bundle.text_embeddings()["text_embeddings"]
    expected = model.backbone.scale / temperature * model.class_rows.rows.numpy()
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    logits, _, embedding = Classifier.load(out).backend.run(pixels)
    biases = model.class_rows.biases.numpy() / temperature
    np.testing.assert_allclose(logits, embedding @ expected.T + biases, atol=1e-4)


def test_force_writes_a_bundle_that_says_that_it_failed(tuned_run, tmp_path, monkeypatch):
    with_impossible_limits(monkeypatch)
    out = export_run(tuned_run, tmp_path / "x.capt", options=ExportOptions(force=True))
    assert open_bundle(out).manifest.verified is False
    assert json.loads((out / "report.json").read_text())["gate"]["fp32"]["passed"] is False
    with pytest.warns(UserWarning, match="although its check had failed"):
        Classifier.load(out)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precisions": ("fp8",)},
        {"precisions": ()},
        {"precisions": ("fp16", "fp16")},
        {"opset": 17},
        {"gate_images": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        ExportOptions(**wrong)


def test_weights_beyond_one_file_go_into_a_second_one(tuned_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_LARGEST_BYTES", 10_000)
    out = export_run(tuned_run, tmp_path / "x.capt")
    manifest = open_bundle(out).manifest
    assert manifest.graphs["fp32"].weights == "model.onnx.data"
    assert {"model.onnx", "model.onnx.data"} <= set(manifest.files)
    assert (out / "model.onnx").stat().st_size < (out / "model.onnx.data").stat().st_size
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with Classifier.load(out) as classifier:
        assert classifier.class_names == load_run(tuned_run).class_names
        assert not list((tmp_path / "temporary").iterdir())  # the copy of the weights has gone
        assert classifier(np.zeros((16, 16, 3), np.uint8)).label in classifier.class_names
    with pytest.raises(BundleError, match="load the whole bundle"):
        Classifier.load(out / "model.onnx")
    (out / "model.onnx.data").write_bytes(b"\0" * manifest.files["model.onnx.data"].bytes)
    with pytest.raises(BundleError, match="changed after the export"):
        Classifier.load(out)
    zipped = shutil.make_archive(str(tmp_path / "x"), "zip", out)
    with pytest.raises(BundleError, match="unpack it"):
        Classifier.load(zipped)


def test_a_graph_of_nothing_but_nan_is_written_only_by_force(tuned_run, tmp_path, monkeypatch):
    plain = VisualClassifier.lower

    def broken(self, dtype):
        plain(self, dtype)
        self.weight *= float("nan")

    monkeypatch.setattr(VisualClassifier, "lower", broken)
    with pytest.raises(GateError, match="max logit difference nan"):
        export_run(tuned_run, tmp_path / "x.capt", options=ExportOptions(("fp16",)))
    out = export_run(tuned_run, tmp_path / "x.capt", options=ExportOptions(("fp16",), force=True))
    report = json.loads((out / "report.json").read_text())
    assert report["gate"]["fp16"]["max_logit_difference"] is None


def test_a_large_bfloat16_graph_is_proved_too(tuned_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_LARGEST_BYTES", 10_000)
    out = export_run(tuned_run, tmp_path / "x.capt", options=ExportOptions(("bf16",)))
    assert sorted(file.name for file in out.iterdir() if "model" in file.name) == [
        *("model.onnx", "model.onnx.data")
    ]


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tuned_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="expected a writable folder"):
        export_run(tuned_run, tmp_path / "file" / "x.capt")
