import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from capt_deploy import BundleError, Classifier, DataError
from capt_deploy.evaluation.scoring import score_bundle
from capt_deploy.metrics.calibration import all_metrics

GOLDEN = Path(__file__).parents[2] / "golden"
BUNDLE, PHOTOS = GOLDEN / "tiny.capt", GOLDEN / "photos"


@pytest.fixture
def data(tmp_path):
    """All four classes, so that base and new both have images."""
    folder = tmp_path / "data"
    shutil.copytree(PHOTOS, folder)
    (folder / "test" / "red_ball").mkdir()
    shutil.copy(folder / "test/grey_stone/0.png", folder / "test/red_ball/9.png")
    return folder


def test_accuracy_is_that_of_the_predictions(data):
    report = score_bundle(BUNDLE, data).report()
    classifier = Classifier.load(BUNDLE)
    photos = sorted((data / "test").rglob("*.png"))
    hits = [classifier(photo).label == photo.parent.name.replace("_", " ") for photo in photos]
    assert report["all"]["n"] == len(photos) == 4
    assert report["all"]["accuracy"] == pytest.approx(np.mean(hits))


def test_base_and_new_use_their_own_columns_only(data):
    report = score_bundle(BUNDLE, data).report()
    classifier = Classifier.load(BUNDLE)
    hits = []
    for photo in sorted((data / "test").rglob("*.png")):
        label = classifier.class_names.index(photo.parent.name.replace("_", " "))
        if label >= 2:  # grey stone and red ball were not tuned on
            hits.append(classifier(photo).probabilities[2:].argmax() + 2 == label)
    assert report["new"]["n"] == 2
    assert report["new"]["accuracy"] == pytest.approx(np.mean(hits))


def test_the_report_has_the_keys_of_the_contract(data):
    report = score_bundle(BUNDLE, data).report()
    metrics = set(all_metrics(np.eye(2), np.arange(2)))
    assert len(metrics) == 9
    for scope in ("base", "new", "all"):
        assert metrics <= set(report[scope])
        assert metrics <= set(report["zero_shot"][scope])
    assert {"recovered", "broken", "pairs"} <= set(report["confusion"])
    assert "harmonic_mean" in report


def test_an_unreadable_photo_is_listed_and_left_out(data):
    (data / "test" / "red_ball" / "broken.png").write_bytes(b"nothing")
    report = score_bundle(BUNDLE, data).report()
    assert report["all"]["n"] == 4
    assert [path for path, _ in report["skipped"]] == ["test/red_ball/broken.png"]


def test_labels_are_matched_by_name_not_by_order(data, tmp_path):
    rows = [
        {"path": str(photo.relative_to(data.parent)), "label": photo.parent.name, "split": "test"}
        for photo in sorted((data / "test").rglob("*.png"), reverse=True)
        if photo.parent.name != "blue_sky"  # so that positions differ from the bundle's
    ]
    listing = tmp_path / "list.csv"
    with listing.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    shutil.rmtree(data / "test" / "blue_sky")
    listed, whole = (score_bundle(BUNDLE, source).report() for source in (listing, data))
    assert listed["all"] == whole["all"]


def test_a_class_that_the_bundle_does_not_know_is_refused(data):
    (data / "test" / "zebra").mkdir()
    shutil.copy(data / "test/red_ball/9.png", data / "test/zebra/0.png")
    with pytest.raises(DataError, match="zebra"):
        score_bundle(BUNDLE, data).report()


def test_a_lone_graph_has_no_zero_shot_rows_to_compare_with(data):
    with pytest.raises(BundleError, match="expected a bundle, came a graph alone"):
        score_bundle(BUNDLE / "model.onnx", data).report()
