"""`capt-eval --report` on a real run and its real bundle."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from capt_train.data.suspects import SUSPECTS, Suspects
from export.cli.eval import main

FILES = {"report.html", "report.md", "report.json"}


def evaluate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_run_has_its_exported_graphs_beside_it(tuned_run, full_bundle, photos, tmp_path):
    page = tmp_path / "page"
    wanted = ("--exported", full_bundle, "--report", page, "--backend", "onnxruntime-cpu")
    result = evaluate(tuned_run, "--data", photos, *wanted, "--json")
    assert result.exit_code == 0, result.output
    assert {file.name for file in page.iterdir()} == FILES
    written = json.loads((page / "report.json").read_text())
    names = [model["name"] for model in written["models"]]
    # ONNX Runtime has no kernels for bfloat16 on the CPU
    graphs = [f"exported {precision}" for precision in ("fp32", "fp16", "int8", "int8-cpu")]
    assert names == ["zero-shot", "tuned", *graphs]
    assert any("bf16 graph cannot run here" in note for note in written["notes"])
    asked = json.loads(result.stdout)
    _, tuned, fp32, *_ = written["models"]
    for scope in ("base", "new", "all"):
        assert tuned[scope] == pytest.approx(asked[scope])
        assert fp32[scope]["nll"] == pytest.approx(tuned[scope]["nll"], abs=1e-5)
        assert fp32["uncalibrated"][scope]["nll"] == pytest.approx(
            tuned["uncalibrated"][scope]["nll"], abs=1e-5
        )
    assert written["provenance"]["data_fingerprint"]
    assert str(photos) not in (page / "report.json").read_text()  # nor any folder of this machine


def test_the_bundle_gets_the_class_names_of_the_run(tuned_run, bundle, photos, tmp_path):
    data, run = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, data)
    for split in data.iterdir():
        (split / "blue_sky").rename(split / "sky_1")
    names = tmp_path / "names.json"
    names.write_text('{"sky_1": "blue sky"}')
    shutil.copytree(tuned_run, run)
    config = json.loads((run / "config.json").read_text())
    config["config"]["class_names"] = str(names)
    (run / "config.json").write_text(json.dumps(config))
    options = ("--exported", bundle, "--report", tmp_path / "page")
    result = evaluate(run, "--data", data, *options)
    assert result.exit_code == 0, result.output


def test_a_bundle_alone_has_a_page_too(bundle, photos, tmp_path):
    page = tmp_path / "page"
    result = evaluate(bundle, "--data", photos, "--report", page)
    assert result.exit_code == 0, result.output
    written = json.loads((page / "report.json").read_text())
    assert [model["name"] for model in written["models"]] == ["exported fp32"]
    assert f"report written to {page / 'report.html'}" in result.stderr


def test_images_that_only_one_of_them_could_read_are_left_out(
    tuned_run, bundle, photos, tmp_path, monkeypatch
):
    import export.report as module

    data = shutil.copytree(photos, tmp_path / "photos")
    score_graphs = module.score_graphs

    def with_a_loss(*arguments):
        (data / "test" / "blue_sky" / "0.png").write_bytes(b"gone since")
        return score_graphs(*arguments)

    monkeypatch.setattr(module, "score_graphs", with_a_loss)
    page = tmp_path / "page"
    result = evaluate(tuned_run, "--data", data, "--exported", bundle, "--report", page)
    assert result.exit_code == 0, result.output
    _, tuned, fp32 = json.loads((page / "report.json").read_text())["models"]
    assert tuned["all"]["n"] == fp32["all"]["n"] == 19
    assert fp32["all"]["accuracy"] == tuned["all"]["accuracy"]


def test_a_bundle_of_another_run_is_refused(tuned_run, golden_bundle, photos, tmp_path):
    page = tmp_path / "page"
    result = evaluate(tuned_run, "--data", photos, "--exported", golden_bundle, "--report", page)
    assert result.exit_code == 2
    assert (
        "--exported: expected a bundle exported from this run, came one that differs in "
        in result.stderr
    )
    assert not page.exists()


@pytest.fixture
def golden_bundle():
    """A bundle of the same classes, from another model."""
    return Path(__file__).parents[1] / "golden" / "tiny.capt"


def test_what_takes_from_the_figures_is_said_on_the_page(tuned_run, bundle, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "photos")
    (own / "val" / "blue_sky" / "0.png").write_bytes(b"no image")
    page = tmp_path / "page"
    result = evaluate(bundle, "--data", own, "--split", "val", "--report", page)
    assert result.exit_code == 0, result.output
    notes = json.loads((page / "report.json").read_text())["notes"]
    assert any("left out 1 file or folder" in note for note in notes)
    assert any("used to choose and calibrate the model" in note for note in notes)
    assert any("to compare with it, evaluate the run" in note for note in notes)
    shutil.copy(own / "train" / "red_ball" / "0.png", own / "test" / "red_ball" / "0.png")
    shutil.copytree(own / "train", own / "test", dirs_exist_ok=True)
    result = evaluate(tuned_run, "--data", own, "--report", page)
    notes = json.loads((page / "report.json").read_text())["notes"]
    assert "the run itself has used 8 images of this split: the figures flatter it" in notes


def test_a_page_about_a_bundle_needs_no_torch(bundle, photos, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['open_clip'] = None\n"
        "from export.cli.eval import main; main()"
    )
    command = [sys.executable, "-c", code, bundle, "--data", photos, "--report", tmp_path / "page"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--classes", "base", "--report", "page"), "--report shows all classes"),
        (("--exported", "nowhere", "--report", "page"), "nowhere: no such bundle"),
        (("--exported", "x.capt"), "--exported goes with --report, and with a run"),
        (("--report", "taken"), "expected a new folder or one with an earlier report"),
    ],
)
def test_what_cannot_be_done_is_said_before_time_is_spent(
    tuned_run, photos, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    result = evaluate(tuned_run, "--data", photos, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "embedding" not in result.stderr
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


def test_a_bundle_of_other_classes_is_refused(tuned_run, photos, tmp_path):
    from export.writer import export_run

    names = ("blue sky", "red ball", "green leaf", "grey stone")
    other = export_run(tuned_run, tmp_path / "x.capt", class_names=names)
    result = evaluate(tuned_run, "--data", photos, "--exported", other, "--report", tmp_path / "p")
    assert result.exit_code == 2
    assert "expected a bundle with the classes of the run" in result.stderr
    assert not (tmp_path / "p").exists()


def test_the_page_of_a_run_shows_suspect_labels_and_what_to_do(tuned_run, photos, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned_run, run)
    suspects = Suspects.load(run / SUSPECTS)
    first = suspects.labels[0]
    other = next(photo.label for photo in suspects.labels if photo.label != first.label)
    doubted = replace(first, likely=other, p_wrong=0.9)
    gone = replace(doubted, path="train/gone.png")
    Suspects((doubted, gone), 0.1, ()).save(run / SUSPECTS)
    result = evaluate(run, "--data", photos, "--report", tmp_path / "page")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "page" / "report.json").read_text())
    group = written["gallery"][-1]
    assert (group["title"], group["images"]) == ("Suspect labels", 1)
    assert group["worst"][0]["true"] == first.label
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("What to do:") >= 4
    assert "What to do:" in (tmp_path / "page" / "report.md").read_text()
