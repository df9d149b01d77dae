import json

import numpy as np
import pytest
from click.testing import CliRunner

from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from capt_train.pipeline import train
from capt_train.run.folder import load_run
from export.cli.eval import main
from export.writer import export_run
from tests.configs import train_config


def evaluate(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def frozen_vision(tiny_model_dir, photos, tmp_path_factory):
    """A run whose visual side is the frozen one, and its bundle."""
    folder = tmp_path_factory.mktemp("frozen")
    config = train_config(
        data=str(photos),
        model=f"local-dir:{tiny_model_dir}",
        method="coop",
        classes="base",
        shots=4,
        tuning_epochs=3,
    )
    train(config, folder / "run")
    return folder / "run", export_run(folder / "run", folder / "frozen.capt")


def test_run_and_bundle_get_the_same_report(frozen_vision, photos):
    ours, theirs = (evaluate(path, "--data", photos) for path in frozen_vision)
    same_figures(ours, theirs)
    for scope in ("base", "new", "all"):
        assert ours["zero_shot"][scope]["accuracy"] == theirs["zero_shot"][scope]["accuracy"]
    assert ours["confusion"] == theirs["confusion"]


def same_figures(ours, theirs):
    for scope in ("base", "new", "all"):
        assert ours[scope]["accuracy"] == theirs[scope]["accuracy"]
        assert ours[scope]["n"] == theirs[scope]["n"]
        assert ours[scope]["nll"] == pytest.approx(theirs[scope]["nll"], abs=1e-5)
        raw, same = ours["uncalibrated"][scope], theirs["uncalibrated"][scope]
        assert raw == pytest.approx(same, abs=1e-5)
    assert ours["harmonic_mean"] == theirs["harmonic_mean"]
    assert ours.keys() == theirs.keys()


def test_a_bundle_with_a_tuned_visual_side_does_not_pretend_to_know_the_frozen_one(
    tuned_run, bundle, photos
):
    ours, theirs = (evaluate(path, "--data", photos) for path in (tuned_run, bundle))
    same_figures(ours, theirs)
    assert ours["zero_shot"]["base"] is not None
    assert theirs["zero_shot"] is None and theirs["uncalibrated"]["zero_shot"] is None
    confusion = theirs["confusion"]
    assert confusion["recovered"] is confusion["broken"] is confusion["counts"] is None
    after = {(p["true"], p["predicted"]): p["tuned"] for p in ours["confusion"]["pairs"]}
    for pair in confusion["pairs"]:
        assert pair["zero_shot"] is None
        assert pair["tuned"] == after[pair["true"], pair["predicted"]]
    done = CliRunner().invoke(main, [str(bundle), "--data", str(photos)])
    assert done.exit_code == 0 and "to compare with it, evaluate the run" in done.stderr


def test_evaluating_again_gives_what_training_wrote(tuned_run, photos):
    written = json.loads((tuned_run / "metrics.json").read_text())
    assert evaluate(tuned_run, "--data", photos)["all"] == written["all"]


def test_one_scope_or_another_split_can_be_asked_for(tuned_run, bundle, photos):
    for model in (tuned_run, bundle):
        report = evaluate(model, "--data", photos, "--classes", "new", "--split", "val")
        assert report["new"]["n"] == 8
        assert report["base"] is None and report["all"] is None


def test_a_bundle_made_from_all_classes_has_no_new_ones(tiny_model_dir, photos, tmp_path):
    model = f"local-dir:{tiny_model_dir}"
    config = train_config(data=str(photos), model=model, method="coop", shots=2, tuning_epochs=2)
    train(config, tmp_path / "run")
    report = evaluate(tmp_path / "run", "--data", photos)
    assert report["base"] is None and report["new"] is None and report["harmonic_mean"] is None
    assert report["all"]["n"] == 20
    arguments = [str(tmp_path / "run"), "--data", str(photos), "--classes", "new"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "no images of 'new'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "--data", "{photos}"), "no such run or bundle"),
        (("{run}", "--data", "nowhere"), "no such folder"),
        (("{bundle}", "--data", "{photos}", "--backend", "abacus"), "expected one of"),
        (("{run}",), "--data"),
    ],
)
def test_bad_input_exits_with_2_and_no_traceback(arguments, said, tuned_run, bundle, photos):
    places = {"photos": photos, "run": tuned_run, "bundle": bundle}
    result = CliRunner().invoke(main, [text.format(**places) for text in arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def few_photos(source, target):
    """Link ten test photos of every class, and what little tuning needs."""
    for split, count in (("train", 2), ("val", 1), ("test", 10)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:count]:
                (target / split / folder.name / photo.name).symlink_to(photo)
    return target


def test_on_real_photos_the_bundle_says_what_the_run_says(shared, tmp_path):
    import torch

    # the set on which colours and the visual side have something to mend
    data = few_photos(shared / "data" / "cifar100-camera", tmp_path / "data")
    model = f"local-dir:{shared / 'models' / 'tinyclip-cifar'}"
    few = {
        "shots": 4,
        "tuning_epochs": 3,
        "visual_epochs": 3,
        "visual_views": 3,
    }
    few |= {"visual_strength": "0.75", "map_side": "classes", "map_ridge": 0.01}
    few["rows_weight"] = 0.1  # nothing is chosen
    train(train_config(str(data), model, method="full", classes="base", **few), tmp_path / "run")
    classifier = Classifier.load(export_run(tmp_path / "run", tmp_path / "cifar.capt"))
    tuned = load_run(tmp_path / "run")
    photos = sorted((data / "test").rglob("*.png"))
    pixels = np.stack([preprocess(photo, tuned.backbone.preprocess) for photo in photos])
    expected = tuned.logits(tuned.learner.image_embeddings(torch.from_numpy(pixels)))
    assert tuned.visual is not None and tuned.learner.recoloured
    found = classifier.backend.run(pixels)
    assert len(photos) == 1000
    assert np.abs(found.logits - expected.numpy()).max() <= 1e-4
    probabilities = tuned.fitted.calibration.probabilities(expected.numpy())
    assert np.abs(found.probabilities - probabilities).max() <= 1e-4
    assert (found.logits.argmax(axis=1) == expected.numpy().argmax(axis=1)).all()
