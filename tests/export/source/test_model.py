import dataclasses
import shutil

import numpy as np
import pytest
import torch

from capt_deploy.core.errors import DataError
from capt_train.run.folder import load_run
from export.source.model import source_from_run
from export.source.photos import Photo, spread_evenly


@pytest.fixture(scope="module")
def model(tuned_run):
    return load_run(tuned_run)


def test_its_head_gives_the_tuned_models_logits(model):
    source = source_from_run(model)
    images = torch.nn.functional.normalize(torch.randn(5, 32), dim=1)
    logits = images @ source.head.weight.T + source.head.bias
    torch.testing.assert_close(logits, model.logits(images), atol=1e-4, rtol=0)
    assert source.moves_images and source.zero_shot_head is None  # its images have moved


def test_the_gates_images_are_the_runs_validation_images(model, photos):
    source = source_from_run(model)
    expected = {(photos / item.path, item.label) for item in model.split.val}
    assert {(photo.path, photo.label) for photo in source.photos.gate} == expected
    assert {p.path for p in source.photos.training} == {photos / i.path for i in model.split.train}


def test_a_moved_data_set_is_known_by_its_files(model, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    source = source_from_run(model, moved)
    assert {p.path for p in source.photos.gate} == {moved / item.path for item in model.split.val}


def test_other_labelled_images_are_aligned_by_name(model, photos, tmp_path):
    # another data set with fewer classes, in another layout
    for name in ("red_ball", "blue_sky"):
        shutil.copytree(photos / "test" / name, tmp_path / "other" / "val" / name)
    source = source_from_run(model, tmp_path / "other")
    found = {(photo.path.parent.name, photo.label) for photo in source.photos.gate}
    assert found == {("blue_sky", 0), ("red_ball", 3)}


@pytest.mark.parametrize("folder", ["unknown class", "flat"])
def test_images_without_a_known_class_have_no_label(model, photos, tmp_path, folder):
    target = tmp_path / "photos" / ("cats" if folder == "unknown class" else "")
    shutil.copytree(photos / "test" / "red_ball", target, dirs_exist_ok=True)
    source = source_from_run(model, tmp_path / "photos")
    assert len(source.photos.gate) == 5
    assert {photo.label for photo in source.photos.gate} == {-1}


def test_an_empty_folder_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="found no image"):
        source_from_run(model, tmp_path)


def test_some_of_many_are_spread_evenly(tmp_path):
    photos = tuple(Photo(tmp_path / str(number), number) for number in range(100))
    assert [photo.label for photo in spread_evenly(photos, 5)] == [0, 25, 50, 74, 99]
    assert spread_evenly(photos, 1000) == list(photos)
    assert spread_evenly((), 5) == []
    labels = np.array([photo.label for photo in spread_evenly(photos, 50)])
    assert np.diff(labels).max() <= 3


def test_files_of_the_same_names_are_not_the_data_set(model, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    one = next((moved / "val" / "red_ball").iterdir()).read_bytes()
    for file in moved.rglob("*.png"):
        file.write_bytes(one)
    source = source_from_run(model, moved)
    # read as another data set, and int8 keeps to the run's own training images
    assert {p.path for p in source.photos.training} == {photos / i.path for i in model.split.train}
    assert len(source.photos.gate) == 16  # all of its val/, where the run has but two classes


def test_without_validation_images_the_gate_takes_half_of_the_others(model, photos):
    split = dataclasses.replace(model.split, val=())
    source = source_from_run(dataclasses.replace(model, split=split))
    gate, train = ({p.path for p in own} for own in (source.photos.gate, source.photos.training))
    assert len(gate) == len(train) == 4 and not gate & train
    assert gate | train == {photos / item.path for item in model.split.train}
