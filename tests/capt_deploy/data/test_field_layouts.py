"""FGVC Aircraft, ImageNet and its variants, laid out as their authors do."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from capt_deploy.core.errors import DataError
from capt_deploy.data.datasets import Dataset, read_dataset

NAMES = "n01 tench\nn02 electric ray\nn03 great white shark\n"


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def listed(dataset: Dataset, split: str) -> list[tuple[str, str]]:
    return [(item.path, dataset.class_names[item.label]) for item in dataset.splits[split]]


def test_aircraft_is_read_from_its_lists(tmp_path: Path) -> None:
    lists = {"train": ["0001 707-320", "0002 A300B4"], "val": ["0003 707-320"]}
    lists["test"] = ["0004 A300B4"]
    for split, lines in lists.items():
        (tmp_path / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            photo(tmp_path / "images" / f"{line.split()[0]}.jpg")
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == ("707-320", "A300B4")
    assert listed(dataset, "train") == [
        ("images/0001.jpg", "707-320"),
        ("images/0002.jpg", "A300B4"),
    ]
    assert listed(dataset, "val") == [("images/0003.jpg", "707-320")]
    assert listed(dataset, "test") == [("images/0004.jpg", "A300B4")]


def test_a_line_of_aircraft_without_a_variant_is_an_error_with_its_place(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / f"images_variant_{split}.txt").write_text("0001\n")
    with pytest.raises(
        DataError, match=r"images_variant_train.txt, line 1: expected NUMBER VARIANT"
    ):
        read_dataset(tmp_path)


def test_imagenet_trains_on_train_and_is_tested_on_val(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text(NAMES)
    for number in (1, 2, 3):
        photo(tmp_path / f"images/train/n0{number}/a.JPEG")
        photo(tmp_path / f"images/val/n0{number}/b.JPEG")
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == ("tench", "electric ray", "great white shark")  # not sorted
    assert ("images/train/n03/a.JPEG", "great white shark") in listed(dataset, "train")
    assert ("images/val/n02/b.JPEG", "electric ray") in listed(dataset, "test")
    assert dataset.splits["val"] == ()


@pytest.mark.parametrize(
    ("folder", "classes"),
    [
        ("images", {"n01": "tench", "n03": "great white shark"}),  # Sketch
        ("imagenet-a", {"n01": "tench", "n02": "electric ray"}),
        ("imagenetv2-matched-frequency-format-val", {"0": "tench", "2": "great white shark"}),
    ],
)
def test_a_variant_is_all_for_testing(tmp_path: Path, folder: str, classes: dict[str, str]) -> None:
    (tmp_path / "classnames.txt").write_text(NAMES)
    for label in classes:
        photo(tmp_path / folder / label / "x.png")
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == tuple(classes.values())  # only those that have photos
    expected = [(f"{folder}/{label}/x.png", name) for label, name in classes.items()]
    assert listed(dataset, "test") == expected
    assert dataset.splits["train"] == ()


def test_a_class_folder_without_a_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text(NAMES)
    photo(tmp_path / "imagenet-r" / "n99" / "x.png")
    with pytest.raises(DataError, match=r"n99: no name for it"):
        read_dataset(tmp_path)


def test_a_folder_that_only_has_such_a_list_is_read_as_usual(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text(NAMES)
    photo(tmp_path / "cats" / "x.png")
    photo(tmp_path / "dogs" / "x.png")
    assert read_dataset(tmp_path).class_names == ("cats", "dogs")


def test_classes_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("n01 missile\nn02 missile\n")
    for label in ("n01", "n02"):
        photo(tmp_path / "imagenet-r" / label / "x.png")
    assert read_dataset(tmp_path).class_names == ("missile", "missile (n02)")
