import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from capt_deploy.bundle.read import open_bundle
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.gate import LIMITS
from export.cli.export import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_it_writes_the_bundle_and_prints_its_report(tuned_run, tmp_path):
    result = run(tuned_run, "--out", tmp_path / "x.capt", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "x.capt/report.json").read_text())
    assert "max |Δlogit|" in result.stderr


def test_a_home_that_the_shell_leaves_alone_is_understood(tuned_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(tuned_run, "--out=~/x.capt", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "x.capt/report.json").read_text())


def test_a_failed_gate_exits_with_1(tuned_run, tmp_path, monkeypatch):
    impossible = replace(LIMITS["fp32"], max_probability_difference=-1.0)
    monkeypatch.setitem(LIMITS, "fp32", impossible)
    result = run(tuned_run, "--out", tmp_path / "x.capt")
    assert result.exit_code == 1
    assert "was not written" in result.stderr
    assert not (tmp_path / "x.capt").exists()


def test_graphs_that_pass_are_written_without_one_that_fails(tuned_run, tmp_path, monkeypatch):
    impossible = replace(LIMITS["fp32"], max_probability_difference=-1.0)
    monkeypatch.setitem(LIMITS, "fp32", impossible)
    folders = {"out": tmp_path / "x.capt", "triton": tmp_path / "triton"}
    options = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    result = run(tuned_run, *options, "--fp32", "--fp16", "--json")
    assert result.exit_code == 1
    assert "was written with fp16 only" in result.stderr
    assert "Drop --fp32 next time; or remove the bundle and add --force" in result.stderr
    assert Classifier.load(folders["out"] / "model.onnx").precision == "fp16"
    manifest = open_bundle(folders["out"]).manifest
    assert list(manifest.graphs) == ["fp16"] and manifest.verified
    gate = json.loads(result.stdout)["gate"]
    assert (gate["fp32"]["passed"], gate["fp16"]["passed"]) == (False, True)
    assert (folders["triton"] / "x_onnx").is_dir()


@pytest.mark.parametrize("case", ["no run", "taken", "no out"])
def test_bad_input_exits_with_2_and_no_traceback(case, tuned_run, tmp_path):
    arguments = {
        "no run": (tmp_path / "nowhere", "--out", tmp_path / "x.capt"),
        "taken": (tuned_run, "--out", tmp_path),
        "no out": (tuned_run,),
    }[case]
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_precisions_classes_and_triton_in_one_go(text_run, tmp_path):
    (tmp_path / "names.txt").write_text("red ball\nzebra\nblue sky\n")
    options = ("--fp16", "--int8", "--classes", tmp_path / "names.txt")
    result = run(
        text_run(), "--out", tmp_path / "x.capt", *options, "--triton", tmp_path / "triton"
    )
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "x.capt" / "manifest.json").read_text())
    assert list(manifest["graphs"]) == ["fp16", "int8", "int8-cpu"]
    assert manifest["class_names"] == ["red ball", "zebra", "blue sky"]
    assert (tmp_path / "triton" / "x_onnx" / "config.pbtxt").is_file()


def test_new_classes_can_be_calibrated_by_distance_where_all_else_is_asked_for(text_run, tmp_path):
    (tmp_path / "names.txt").write_text("zebra\nred ball\n")
    options = ("--dac", "--open-vocab", "--classes", tmp_path / "names.txt")
    result = run(text_run(), "--out", tmp_path / "x.capt", *options)
    assert result.exit_code == 0, result.stderr
    bundle = open_bundle(tmp_path / "x.capt")
    assert bundle.manifest.calibration["fp32"]["distance_aware"] is True
    factors = bundle.calibration_of("fp32").factors
    assert factors and 1 not in factors and "changes nothing" not in result.stderr
    classifier = Classifier.load(tmp_path / "x.capt")
    classifier.add_classes(["old tractor"])
    assert classifier.class_names == ("zebra", "red ball", "old tractor")


def test_distances_that_change_nothing_are_said_to(text_run, tmp_path):
    (tmp_path / "names.txt").write_text("blue sky\ngreen leaf\n")  # both were tuned on
    result = run(
        *(text_run(), "--out", tmp_path / "x.capt", "--dac", "--classes", tmp_path / "names.txt")
    )
    assert result.exit_code == 0, result.stderr
    assert "--dac changes nothing" in result.stderr


@pytest.mark.parametrize("triton", ["x.capt", "x.capt/triton", "."])
def test_bundle_and_repository_must_be_apart(tuned_run, tmp_path, triton):
    result = run(tuned_run, "--out", tmp_path / "x.capt", "--triton", tmp_path / triton)
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []
