import json
import shutil
import threading
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from capt_deploy import BackendError, BundleError, Classifier, DecisionOptions, ImageError
from capt_deploy.core.errors import ConfigError
from capt_deploy.data.batches import in_batches
from capt_deploy.serving.batcher import BatcherOptions

GOLDEN = Path(__file__).parents[2] / "golden"
PHOTOS = sorted((GOLDEN / "photos").rglob("*.png"))
# Pillow 12, the last for Python 3.10, resizes some photos to pixels that differ by 1 of 255.
TOLERANCE = 1e-5 if int(PIL.__version__.split(".")[0]) >= 13 else 2e-3


@pytest.fixture(scope="module")
def classifier():
    return Classifier.load(GOLDEN / "tiny.capt")


@pytest.fixture(scope="module")
def expected():
    content = json.loads((GOLDEN / "expected.json").read_text())
    return {GOLDEN / "photos" / name: row for name, row in content["probabilities"].items()}


def test_probabilities_are_those_that_torch_computed(classifier, expected):
    assert len(expected) == 3
    for photo, probabilities in expected.items():
        np.testing.assert_allclose(classifier(photo).probabilities, probabilities, atol=TOLERANCE)


def test_a_prediction_names_its_most_probable_class(classifier, expected):
    for photo, probabilities in expected.items():
        prediction = classifier(photo)
        assert prediction.label == classifier.class_names[int(np.argmax(probabilities))]
        assert prediction.confidence == pytest.approx(max(probabilities), abs=TOLERANCE)
        names, shares = zip(*prediction.top(4), strict=True)
        assert sorted(names) == sorted(classifier.class_names)
        assert list(shares) == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert repr(prediction).startswith(f"Prediction(label={prediction.label!r}")


def test_all_kinds_of_input_agree(classifier):
    photo = PHOTOS[1]
    image = Image.open(photo)
    wanted = classifier(photo).probabilities
    for same in (str(photo), photo.read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(classifier(same).probabilities, wanted)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_batch_size_does_not_change_predictions(classifier, batch_size):
    images = PHOTOS * 3
    together = classifier.predict(images, batch_size=batch_size)
    for image, prediction in zip(images, together, strict=True):
        np.testing.assert_allclose(
            prediction.probabilities, classifier(image).probabilities, atol=1e-6
        )


@pytest.mark.parametrize("form", ["path", "text", "bytes", "array", "grey", "pillow"])
def test_a_single_image_gives_a_list_of_one_prediction(classifier, form):
    opened = Image.open(PHOTOS[0]).convert("RGB")
    image = {
        "path": PHOTOS[0],
        "text": str(PHOTOS[0]),
        "bytes": PHOTOS[0].read_bytes(),
        "array": np.asarray(opened),
        "grey": np.asarray(opened.convert("L")),
        "pillow": opened,
    }[form]
    (prediction,) = classifier.predict(image)
    np.testing.assert_array_equal(prediction.probabilities, classifier(image).probabilities)
    with pytest.raises(ImageError, match="no such file"):
        classifier.predict("photo.jpg")


def test_an_array_of_images_is_several(classifier):
    images = np.zeros((3, 20, 30, 3), np.uint8)
    assert len(classifier.predict(images)) == 3


def test_errors_can_be_returned_in_the_place_of_their_image(classifier, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    images = [PHOTOS[0], tmp_path / "broken.jpg", b"", PHOTOS[1]]
    for batch_size in (1, 2, 32):
        first, broken, empty, last = classifier.predict(images, batch_size, errors="return")
        assert isinstance(broken, ImageError) and "broken.jpg" in str(broken)
        assert isinstance(empty, ImageError)
        expected = [classifier(PHOTOS[0]).label, classifier(PHOTOS[1]).label]
        assert [first.label, last.label] == expected
    assert len(classifier.predict([b"", b""], errors="return")) == 2
    with pytest.raises(ConfigError, match="errors: expected 'raise' or 'return', came 'ignore'"):
        classifier.predict(images, errors="ignore")


def test_a_stream_yields_each_batch_as_it_is_done(classifier):
    drawn = []

    def images():
        for number in range(9):
            drawn.append(number)
            yield PHOTOS[number % 3]

    stream = classifier.stream(images(), batch_size=2)
    assert next(stream).label == classifier(PHOTOS[0]).label
    assert len(drawn) == 4
    assert len(list(stream)) == 8


def test_no_images_give_no_predictions(classifier):
    assert classifier.predict([]) == []


def test_a_batch_size_of_zero_is_refused(classifier):
    with pytest.raises(ValueError, match="batch_size"):
        classifier.predict(PHOTOS, batch_size=0)


def test_an_unreadable_image_is_an_error_that_names_it(classifier, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        classifier.predict([PHOTOS[0], broken])


def test_a_zip_of_the_bundle_loads_too(classifier, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "tiny"), "zip", GOLDEN / "tiny.capt")
    renamed = Path(archive).rename(tmp_path / "tiny.capt")
    zipped = Classifier.load(renamed)
    wanted = classifier(PHOTOS[0]).probabilities
    np.testing.assert_array_equal(zipped(PHOTOS[0]).probabilities, wanted)


def test_a_lone_onnx_file_describes_itself(classifier):
    lone = Classifier.load(GOLDEN / "tiny.capt" / "model.onnx")
    assert lone.class_names == classifier.class_names
    wanted = classifier(PHOTOS[0]).probabilities
    np.testing.assert_array_equal(lone(PHOTOS[0]).probabilities, wanted)


def test_a_changed_graph_is_not_run(tmp_path):
    copy = tmp_path / "changed.capt"
    shutil.copytree(GOLDEN / "tiny.capt", copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was exported"):
        Classifier.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["class_names"].reverse(),
        lambda values: values["preprocess"].update(size=[8, 8]),
        lambda values: values["calibration"]["fp32"].update(temperature=9.0),
    ],
)
def test_a_changed_manifest_is_noticed_for_the_graph_carries_its_own(tmp_path, change):
    copy = tmp_path / "changed.capt"
    shutil.copytree(GOLDEN / "tiny.capt", copy)
    values = json.loads((copy / "manifest.json").read_text())
    change(values)
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="manifest was changed after the export"):
        Classifier.load(copy)


@pytest.mark.parametrize("content", [b"", b"not a graph at all"])
def test_a_file_that_is_no_graph_is_a_clear_error(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="carries no manifest"):
        Classifier.load(path)


def test_unknown_backend_and_precision_are_refused():
    with pytest.raises(BackendError, match=r"expected one of auto, tensorrt, .*onnxruntime-cpu"):
        Classifier.load(GOLDEN / "tiny.capt", backend="quantum")
    with pytest.raises(BundleError, match="it holds fp32"):
        Classifier.load(GOLDEN / "tiny.capt", precision="int3")
    with pytest.raises(BundleError, match="no such bundle"):
        Classifier.load(GOLDEN / "missing.capt")


def test_threads_get_the_same_answers(classifier):
    wanted = [classifier(photo).probabilities for photo in PHOTOS]
    wrong: list[str] = []

    def work():
        for _ in range(20):
            for photo, row in zip(PHOTOS, wanted, strict=True):
                if not np.allclose(classifier(photo).probabilities, row, atol=1e-6):
                    wrong.append(photo.name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_image_that_is_there_twice_is_decoded_once_and_for_all(classifier):
    opened = Image.open(PHOTOS[0])
    found = classifier.predict([opened] * 8, batch_size=3)
    wanted = classifier(PHOTOS[0]).probabilities
    for prediction in found:
        np.testing.assert_allclose(prediction.probabilities, wanted, atol=1e-6)


def test_images_are_drawn_one_batch_ahead_and_no_further(classifier):
    drawn = []

    def images():
        for number in range(9):
            drawn.append(number)
            yield PHOTOS[number % 3]

    batches = in_batches(images(), classifier.preprocess, 2)
    assert [(len(batch), len(drawn)) for batch in batches] == [
        (2, 4),
        (2, 6),
        (2, 8),
        (2, 9),
        (1, 9),
    ]
    assert len(classifier.predict(images(), batch_size=2)) == 9


def test_a_closed_classifier_says_so_and_answers_nothing_more():
    with Classifier.load(GOLDEN / "tiny.capt") as own:
        waiting = [own.submit(photo) for photo in PHOTOS]
    assert all(future.result().label in own.class_names for future in waiting)
    own.close()
    for call in (
        lambda: own(PHOTOS[0]),
        lambda: own.predict(PHOTOS),
        lambda: own.submit(PHOTOS[0]),
        lambda: own.add_classes(["x"]),
    ):
        with pytest.raises(BackendError, match="the classifier is closed; load it again"):
            call()


def test_closing_in_an_answers_callback_still_answers_what_was_submitted():
    own = Classifier.load(GOLDEN / "tiny.capt", batcher=BatcherOptions(max_batch=1))
    image = np.zeros((20, 20, 3), np.uint8)
    futures = [own.submit(image) for _ in range(9)]
    futures[0].add_done_callback(lambda _: own.close())
    assert len({future.result(60).label for future in futures}) == 1
    with pytest.raises(BackendError, match="closed"):
        own.submit(image)


def test_it_says_what_runs_it(classifier):
    assert repr(classifier).startswith(f"Classifier({len(classifier.class_names)} classes, onnx")


@pytest.fixture(scope="module")
def decided(decided_bundle):
    with Classifier.load(decided_bundle) as classifier:
        yield classifier


def test_sets_grow_with_the_coverage_that_is_asked_for(decided):
    usual = decided.predict(PHOTOS)
    wide = decided.predict(PHOTOS, coverage=0.99)
    for photo, own, more in zip(PHOTOS, usual, wide, strict=True):
        assert own.prediction_set[0] == own.label
        assert {*own.prediction_set} <= {*more.prediction_set}
        shares = [dict(more.top(4))[name] for name in more.prediction_set]
        assert shares == sorted(shares, reverse=True)
        assert decided(photo, coverage=0.99).prediction_set == more.prediction_set
        assert own.rejected is None
        assert 0 < own.familiarity <= 1
    assert sum(len(p.prediction_set) for p in wide) > sum(len(p.prediction_set) for p in usual)


def test_a_submitted_image_can_have_a_coverage_and_an_accuracy_of_its_own(decided):
    for photo in PHOTOS:
        futures = [
            decided.submit(photo),
            decided.submit(photo, coverage=0.99),
            decided.submit(photo, accuracy=0.7),
        ]
        usual, wide, strict = (future.result(60) for future in futures)
        assert usual.prediction_set == decided(photo).prediction_set
        assert wide.prediction_set == decided(photo, coverage=0.99).prediction_set
        assert strict.rejected == decided(photo, accuracy=0.7).rejected
        assert usual.rejected is None
    with pytest.raises(ConfigError, match="cannot be promised"):
        decided.submit(PHOTOS[0], accuracy=0.999)


def test_predictions_are_rejected_below_the_threshold_of_the_wanted_accuracy(decided):
    threshold = open_bundle_decisions(decided).threshold(DecisionOptions(accuracy=0.7))
    found = decided.predict(PHOTOS, accuracy=0.7)
    assert [own.rejected for own in found] == [own.confidence < threshold for own in found]


def open_bundle_decisions(classifier):
    return classifier._predictor._scores


def test_what_cannot_be_promised_is_refused(decided, classifier, decided_bundle):
    with pytest.raises(ConfigError, match=r"200 validation images .* cannot be promised"):
        decided(PHOTOS[0], accuracy=0.999)
    with pytest.raises(ConfigError, match="cannot be promised"):
        Classifier.load(decided_bundle, decisions=DecisionOptions(accuracy=0.999))
    for wrong in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ConfigError, match="coverage: expected a share between 0 and 1"):
            decided(PHOTOS[0], coverage=wrong)
    for coverage in (0.8, 0.9):  # also the usual one, once it is asked for
        with pytest.raises(BundleError, match="tune with two photos of each class or more"):
            classifier(PHOTOS[0], coverage=coverage)
    with pytest.raises(BundleError, match="tune with two photos of each class or more"):
        Classifier.load(GOLDEN / "tiny.capt", decisions=DecisionOptions())
    assert classifier(PHOTOS[0]).prediction_set is None


def test_the_partner_of_a_class_is_who_is_most_often_taken_for_it(decided):
    pairs = decided.manifest.confusion_pairs
    for photo in PHOTOS:
        own = decided(photo)
        counts = {p["true"]: p["count"] for p in pairs if p["predicted"] == own.label}
        if not counts:
            assert own.confused_with is None
        else:
            name, share = own.confused_with
            assert counts[name] == max(counts.values())
            assert share == dict(own.top(4))[name]


def test_a_monitor_sees_all_predictions_from_its_first_call_on(decided_bundle):
    wanted = DecisionOptions(accuracy=0.7)
    with Classifier.load(decided_bundle, decisions=wanted) as classifier:
        classifier(PHOTOS[0])
        monitor = classifier.monitor()
        assert monitor is classifier.monitor()
        assert monitor.summary().images == 0
        found = [classifier(PHOTOS[0]), *classifier.predict(PHOTOS)]
        found.append(classifier.submit(PHOTOS[1]).result())
        seen = monitor.summary()
        assert seen.images == len(found) == 5
        assert seen.class_counts == {
            name: sum(own.label == name for own in found) for name in classifier.class_names
        }
        assert seen.rejection_rate == sum(own.rejected for own in found) / 5
        decisions = open_bundle_decisions(classifier)
        expected = decisions.rejection.expected_rejection(decisions.threshold(wanted))
        assert seen.expected_rejection_rate == expected


def test_too_low_a_familiarity_is_refused_where_it_would_reject_nothing(decided_bundle):
    with pytest.raises(ConfigError, match=r"with 200 validation images none is below 0\.005"):
        Classifier.load(decided_bundle, decisions=DecisionOptions(familiarity=0.004))
    with Classifier.load(decided_bundle, decisions=DecisionOptions(familiarity=0.5)) as own:
        for found in own.predict(PHOTOS):
            assert found.rejected is (found.familiarity < 0.5)
