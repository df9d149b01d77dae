"""Which images are shown, and how."""

from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt_deploy.evaluation.evaluate import SuspectPhoto
from capt_deploy.report.gallery import make_gallery, short_names, thumbnail
from capt_deploy.report.measure import Predictions

# One row each of: recovered, still wrong, newly broken, right by both, recovered and worse.
LABELS = np.array([0, 0, 0, 0, 1])
BEFORE = np.array(
    [
        [0.3, 0.4, 0.2, 0.1],
        [0.1, 0.7, 0.1, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.9, 0.1, 0.0, 0.0],
        [0.9, 0.1, 0.0, 0.0],
    ]
)
AFTER = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.02, 0.5, 0.4, 0.08],
        [0.1, 0.2, 0.6, 0.1],
        [1.0, 0.0, 0.0, 0.0],
        [0.1, 0.9, 0.0, 0.0],
    ]
)


def decoded(url):
    kind, content = url.removeprefix("data:image/").split(";base64,")
    image = Image.open(BytesIO(b64decode(content)))
    assert image.format.lower() == kind
    return image


def test_images_are_grouped_by_what_tuning_did_the_worst_first(make_data):
    groups = make_gallery(make_data(5), Predictions(LABELS, AFTER, BEFORE))
    assert [group.title for group in groups] == ["Recovered", "Still wrong", "Newly broken"]
    files = [[card.file for card in group.cards] for group in groups]
    assert files == [["4.png", "0.png"], ["1.png"], ["2.png"]]
    assert [group.images for group in groups] == [2, 1, 1]


def test_bars_are_the_first_three_classes_and_the_true_one(make_data):
    _, still, _ = make_gallery(make_data(5), Predictions(LABELS, AFTER, BEFORE))
    (card,) = still.cards
    assert card.true == "cat"
    assert card.top_classes["tuned"] == [("dog", 0.5), ("cow", 0.4), ("hen", 0.08), ("cat", 0.02)]
    assert card.top_classes["zero-shot"] == [("dog", 0.7), ("cat", 0.1), ("cow", 0.1)]


def test_without_zero_shot_there_are_the_most_confident_mistakes(make_data):
    (group,) = make_gallery(make_data(5, zero_shot=False), Predictions(LABELS, AFTER, None))
    assert [card.file for card in group.cards] == ["2.png", "1.png"]
    assert list(group.cards[0].top_classes) == ["tuned"]


def test_no_more_images_than_one_can_look_at(make_data):
    answers = np.tile([[0.9, 0.1]], (40, 1))
    data = make_data(40, ("a", "b"), zero_shot=False)
    (group,) = make_gallery(data, Predictions(np.ones(40, np.int64), answers, None))
    assert (group.images, len(group.cards)) == (40, 12)


def test_small_photos_stay_as_they_are(tmp_path, noise):
    pixels = noise(32, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    url, size = thumbnail(tmp_path / "a.png")
    assert size == (20, 32)
    assert np.array_equal(np.asarray(decoded(url)), pixels)


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("L", "png"), ("RGBA", "png")])
def test_large_photos_are_shrunk(tmp_path, mode, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.new(mode, (1000, 500)).save(file)
    url, size = thumbnail(file)
    assert decoded(url).size == size == (192, 96)
    assert len(url) < 10_000


def test_a_thumbnail_is_upright_as_the_model_sees_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (400, 200)).save(tmp_path / "a.jpg", exif=exif)
    assert thumbnail(tmp_path / "a.jpg")[1] == (96, 192)


def test_a_file_that_cannot_be_read_leaves_a_gap(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for file in (tmp_path / "a.png", tmp_path / "missing.png", tmp_path, Path("nul\0")):
        assert thumbnail(file) == (None, None)


def test_names_say_nothing_of_the_folders_above():
    files = [Path("/home/me/photos/cat/1.png"), Path("/home/me/photos/dog/1.png")]
    assert short_names(files) == ["cat/1.png", "dog/1.png"]
    assert short_names(files[:1]) == ["1.png"]
    assert short_names([Path("cat/1.png"), Path("dog/2.png")]) == ["cat/1.png", "dog/2.png"]
    assert short_names([Path("/a/b/c.png"), Path("d/e.png")]) == ["b/c.png", "d/e.png"]
    assert short_names([Path("a.png"), Path("b.png")]) == ["a.png", "b.png"]


def test_names_that_are_no_text_can_be_printed():
    assert short_names([Path("/a/b\udcff\n.png")]) == ["b� .png"]


def test_suspect_labels_are_a_group_of_their_own(make_data, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    shares = (("dog", 0.9), ("its label, cat", 0.01))
    photos = [SuspectPhoto(tmp_path / "a.png", "cat", shares)] * 20
    data = make_data(5, suspects=photos)
    *_, group = make_gallery(data, Predictions(LABELS, AFTER, BEFORE))
    assert (group.title, group.images, len(group.cards)) == ("Suspect labels", 20, 12)
    card = group.cards[0]
    assert card.true == "cat"
    assert card.top_classes == {"a model that has not seen it": shares}
    assert decoded(card.picture).size == (40, 30)
