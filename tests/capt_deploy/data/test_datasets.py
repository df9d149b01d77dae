"""The four forms of a data set, the split by hash, and the names of classes."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from capt_deploy.core.errors import DataError
from capt_deploy.data import datasets
from capt_deploy.data.datasets import SPLITS, Dataset, Item, Skipped, read_dataset

NAMES = [f"{label}/{number:02}.jpg" for label in ("ape", "big_cat") for number in range(20)]


def side(dataset: Dataset) -> dict[str, str]:
    """Return the split of every image."""
    return {item.path: split for split in SPLITS for item in dataset.splits[split]}


def test_split_folders_are_read_as_they_stand(put_images: Callable[..., Path]) -> None:
    root = put_images("train/b/1.png", "train/a/deep/2.PNG", "val/a/3.png", "test/b/4.png")
    dataset = read_dataset(root)
    assert dataset.class_names == ("a", "b")
    assert dataset.splits == {
        "train": (Item("train/a/deep/2.PNG", 0), Item("train/b/1.png", 1)),
        "val": (Item("val/a/3.png", 0),),
        "test": (Item("test/b/4.png", 1),),
    }
    assert dataset.path(dataset.items("val")[0]) == root / "val" / "a" / "3.png"
    assert dataset.path(dataset.items("val")[0]).is_file()


@pytest.mark.parametrize(
    "names", [("Train", "Val", "Test"), ("TRAINING", "valid", "Testing"), ("train", "Val", "TEST")]
)
def test_split_folders_are_known_in_any_case(
    put_images: Callable[..., Path], names: tuple[str, str, str]
) -> None:
    dataset = read_dataset(put_images(*(f"{name}/{c}/1.png" for name in names for c in "ab")))
    assert dataset.class_names == ("a", "b")
    expected = {split: f"{name}/a/1.png" for split, name in zip(SPLITS, names, strict=True)}
    assert {split: dataset.items(split)[0].path for split in SPLITS} == expected


def test_what_lies_beside_the_splits_is_left_out_with_a_word(
    put_images: Callable[..., Path],
) -> None:
    dataset = read_dataset(put_images("train/a/1.png", "test/a/1.png", "extra/b/1.png"))
    assert dataset.class_names == ("a",)
    (left_out,) = dataset.skipped
    assert left_out == Skipped("extra", "beside the folders of the splits, not in one")


def test_folders_of_the_system_and_results_of_capt_are_no_classes(
    put_images: Callable[..., Path],
) -> None:
    thumbnail = "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"
    run = ("run1/config.json", "run1/split.json", "run1/confusions.png")
    root = put_images("cat/1.jpg", "dog/1.jpg", thumbnail, "__MACOSX/cat/._1.jpg", *run)
    dataset = read_dataset(root)
    assert dataset.class_names == ("cat", "dog")
    assert sorted(side(dataset)) == ["cat/1.jpg", "dog/1.jpg"]
    assert {file.path: file.reason for file in dataset.skipped} == {
        "cat/@eaDir": "a folder of the system",
        "__MACOSX": "a folder of the system",
        "run1": "holds a run of capt",
    }


def test_both_forms_of_a_letter_are_one_class(put_images: Callable[..., Path]) -> None:
    two, one = "cafe\u0301", "caf\xe9"
    root = put_images(
        f"train/{two}/1.png", f"train/{one}/2.png", f"test/{one}/3.png", "train/t/4.png"
    )
    dataset = read_dataset(root)
    assert dataset.class_names == (one, "t")
    assert [item.path for item in dataset.items("train")][:2] == [
        f"train/{two}/1.png",
        f"train/{one}/2.png",
    ]
    (root / "names.json").write_text(json.dumps({two: "coffee house"}))
    assert read_dataset(root, root / "names.json").class_names == ("coffee house", "t")
    assert read_dataset(root, known_classes=("t", two)).items("test")[0].label == 1


def test_a_listed_file_is_found_in_either_form_of_its_letters(
    put_images: Callable[..., Path],
) -> None:
    two, one = "e\u0301.png", "\xe9.png"
    root = put_images(two, "a.png")
    (root / "list.csv").write_text(f"path,label\n{one},x\na.png,y\n")
    assert [item.path for item in read_dataset(root / "list.csv").items("test")] == [two, "a.png"]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (["b/1.png,x", "b/2.png,y"], r"none of its 2 images is there; .* looked first for /.*b/1"),
        ([], r"list\.csv: found no labelled images; expected rows whose files end in .*\.jpg"),
        (["1,x"], r"list\.csv: found no labelled images \(1 file left out, e\.g\. 1: not an image"),
        (["1.png,x", "1.png,y"], r"1\.png is listed as 'x' and as 'y'"),
    ],
)
def test_a_list_that_leads_nowhere_says_where_it_looked(
    put_images: Callable[..., Path], rows: list[str], named: str
) -> None:
    root = put_images("1.png")
    (root / "list.csv").write_text("\n".join(["path,label", *rows, ""]))
    with pytest.raises(DataError, match=named):
        read_dataset(root / "list.csv")


def test_heic_photos_that_cannot_be_read_here_are_left_out_with_the_way_out(
    put_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put_images("a/1.png", "b/1.HEIC", "b/2.heif")
    monkeypatch.setattr(datasets, "heic_obstacle", lambda: None)
    assert len(read_dataset(root).items("test")) == 3
    monkeypatch.setattr(datasets, "heic_obstacle", lambda: "HEIC: convert it")
    with pytest.raises(DataError, match=r"class \['b'\] \(2 files left out, .* HEIC: convert it"):
        read_dataset(root)


@pytest.mark.parametrize("name", ["list.jsonl", "names.json"])
def test_a_name_that_is_no_text_is_refused(put_images: Callable[..., Path], name: str) -> None:
    root = put_images("a/1.png", "b/1.png")
    row = {"path": "a/1.png", "label": "\ud800"}
    (root / name).write_text(json.dumps(row if name == "list.jsonl" else {"a": "\ud800"}))
    with pytest.raises(DataError, match=r"class names .* are no text in UTF-8; rename them"):
        read_dataset(root / name) if name == "list.jsonl" else read_dataset(root, root / name)


@pytest.mark.skipif(os.name != "posix", reason="pipes need POSIX")
def test_a_list_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"list\.csv: not a readable UTF-8 file"):
        read_dataset(tmp_path / "list.csv")


def test_a_class_may_be_called_train(put_images: Callable[..., Path]) -> None:
    dataset = read_dataset(put_images("train/1.png", "train/2.png", "bus/1.png"))
    assert dataset.class_names == ("bus", "train")


def test_a_lone_test_folder_is_enough_to_evaluate_on(put_images: Callable[..., Path]) -> None:
    dataset = read_dataset(put_images("test/ape/1.png", "test/bee/1.png"))
    assert dataset.splits == {
        "train": (),
        "val": (),
        "test": (Item("test/ape/1.png", 0), Item("test/bee/1.png", 1)),
    }


def test_class_folders_without_a_split_are_all_for_testing_or_all_for_training(
    put_images: Callable[..., Path],
) -> None:
    root = put_images(*NAMES, "rare/1.jpg")
    assert side(read_dataset(root)) == dict.fromkeys([*NAMES, "rare/1.jpg"], "test")
    share = read_dataset(root, test_share=0.0)
    assert side(share) == dict.fromkeys([*NAMES, "rare/1.jpg"], "train")


def test_a_share_of_every_class_is_for_testing(put_images: Callable[..., Path]) -> None:
    others = ["rare/1.jpg", "pair/1.jpg", "pair/2.jpg"]
    dataset = read_dataset(put_images(*NAMES, *others), test_share=0.3)
    assert dataset.class_names == ("ape", "big cat", "pair", "rare")
    counts = {s: Counter(item.label for item in dataset.splits[s]) for s in SPLITS}
    assert counts == {"train": {0: 14, 1: 14, 2: 1, 3: 1}, "val": {}, "test": {0: 6, 1: 6, 2: 1}}
    assert sorted(side(dataset)) == sorted([*NAMES, *others])


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("count", range(1, 13))
def test_no_class_loses_its_last_training_image(
    put_images: Callable[..., Path], count: int, share: float
) -> None:
    root = put_images(*(f"a/{number}.jpg" for number in range(count)))
    dataset = read_dataset(root, test_share=share)
    sizes = {split: len(items) for split, items in dataset.splits.items()}
    assert sizes["train"] >= 1
    assert sizes["test"] == min(round(share * count), count - 1)


def test_a_split_of_its_own_is_kept_whatever_the_share(put_images: Callable[..., Path]) -> None:
    root = put_images("train/b/1.png", "train/a/2.png", "test/b/4.png")
    assert read_dataset(root, test_share=0.0) == read_dataset(root, test_share=1.0)


def test_the_split_follows_the_hash_and_not_the_order_of_names(
    put_images: Callable[..., Path],
) -> None:
    dataset = read_dataset(put_images(*NAMES), test_share=0.2)
    by_hash = sorted(NAMES[:20], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    expected = {"test": by_hash[:4], "train": by_hash[4:]}
    for split, names in expected.items():
        assert [i.path for i in dataset.splits[split] if i.label == 0] == sorted(names)


def test_the_split_depends_on_the_names_only(
    put_images: Callable[..., Path], tmp_path: Path
) -> None:
    before = side(read_dataset(put_images(*NAMES), test_share=0.2))
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    assert side(read_dataset(moved, test_share=0.2)) == before
    listing = moved / "list.csv"
    rows = [f"{name},{name.split('/')[0]}" for name in reversed(NAMES)]
    listing.write_text("\n".join(["path,label", *rows]))
    assert side(read_dataset(listing, test_share=0.2)) == before


def test_an_added_photo_moves_hardly_another_and_none_of_another_class(
    put_images: Callable[..., Path],
) -> None:
    root = put_images(*NAMES)
    before = side(read_dataset(root, test_share=0.2))
    for number in range(20):
        new = root / "ape" / f"new{number}.jpg"
        new.touch()
        after = side(read_dataset(root, test_share=0.2))
        moved = [name for name in before if before[name] != after[name]]
        assert len(moved) <= 3
        assert all(name.startswith("ape/") for name in moved)
        new.unlink()


def test_csv_and_jsonl_hold_their_own_split(put_images: Callable[..., Path]) -> None:
    root = put_images("x/1.png", "x/2.png")
    (root / "a.csv").write_text("path,label,split\nx/1.png,red_fox,train\nx/2.png,ape,test\n")
    dataset = read_dataset(root / "a.csv")
    assert dataset.class_names == ("ape", "red fox")
    assert dataset.splits["train"] == (Item("x/1.png", 1),)
    assert dataset.splits["test"] == (Item("x/2.png", 0),)
    assert dataset.path(dataset.items("test")[0]).is_file()
    rows = [{"path": "x/1.png", "label": "ape"}, {"path": "x/2.png", "label": "ape"}]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_dataset(root / "a.jsonl").items("test")) == 2


def test_a_coop_split_is_found_in_its_folder(put_images: Callable[..., Path]) -> None:
    root = put_images("images/1.png", "images/2.png")
    split = {"train": [["1.png", 0, "zebra"]], "val": [], "test": [["2.png", 1, "sea_lion"]]}
    (root / "split_zhou_Pets.json").write_text(json.dumps(split))
    dataset = read_dataset(root)
    assert dataset == read_dataset(root / "split_zhou_Pets.json")
    assert dataset.class_names == ("zebra", "sea lion")
    assert dataset.path(dataset.items("test")[0]) == root / "images" / "2.png"
    (root / "split_zhou_Cars.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match="pass one of them"):
        read_dataset(root)


def test_files_that_are_no_images_are_counted_and_hidden_ones_ignored(
    put_images: Callable[..., Path],
) -> None:
    root = put_images(
        "a/1.png", "a/.2.png", "a/.cache/3.png", ".git/4.png", "a/notes.txt", "a/Thumbs.db", "5.png"
    )
    dataset = read_dataset(root)
    assert side(dataset) == {"a/1.png": "test"}
    assert dataset.class_names == ("a",)
    assert {row.path for row in dataset.skipped} == {"a/notes.txt", "a/Thumbs.db"}
    assert dataset.skipped[0] == Skipped("a/Thumbs.db", "not an image by its name")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ([], "found no labelled images; expected a folder per class, or train/"),
        (["1.png", "2.png"], "found no labelled images"),
        (["a/1.txt"], r"images \(1 file left out, e\.g\. a/1\.txt: not an image by its name\)"),
        (["a/1.png", "b/1.txt"], r"in class \['b'\] \(1 file left out, e\.g\. b/1\.txt: not an"),
        (["photos/train/a/1.png", "photos/test/a/2.png"], r"with \['test', 'train'\] in it; pass"),
        (
            ["Test/a/1.png", "Val/a/1.png", "a/1.png"],
            r"splits or classes, came both: \['Test', 'Val'",
        ),
        (["train/a/1.png", "train/b/.1.png"], r"no image in class \['b'\]"),
        (["a_b/1.png", "a b/1.png"], r"\['a b', 'a_b'\] have the same name 'a b'"),
        (["Cat/1.png", "cat/1.png"], r"\['Cat', 'cat'\] have the same name 'cat'"),
        (["_/1.png"], "class '_' has an empty name"),
    ],
)
def test_a_folder_without_usable_classes_is_refused(
    put_images: Callable[..., Path], files: list[str], named: str
) -> None:
    with pytest.raises(DataError, match=named) as caught:
        read_dataset(put_images(*files))
    assert "test_a_folder_without" in str(caught.value)  # names where


def test_an_image_listed_twice_is_named(put_images: Callable[..., Path]) -> None:
    root = put_images("1.png")
    (root / "a.csv").write_text("path,label\n1.png,ape\n./1.png,ape\n")
    with pytest.raises(DataError, match=r"listed twice: 1 image, e\.g\. 1\.png"):
        read_dataset(root / "a.csv")


@pytest.mark.parametrize("path", ["../1.png", "a/../../1.png", "/1.png", "//1.png", "..\\1.png"])
def test_a_path_out_of_the_data_set_is_refused(put_images: Callable[..., Path], path: str) -> None:
    root = put_images("1.png")
    (root / "a.csv").write_text(f"path,label\n{path},ape\n")
    with pytest.raises(DataError, match="leads out of"):
        read_dataset(root / "a.csv")


def test_a_path_that_is_no_data_set_is_refused(put_images: Callable[..., Path]) -> None:
    root = put_images("1.png")
    with pytest.raises(DataError, match=r"gone: no such folder or file"):
        read_dataset(root / "gone")
    with pytest.raises(DataError, match=r"1\.png: expected a folder, \.csv"):
        read_dataset(root / "1.png")
    with pytest.raises(DataError, match="no such folder or file"):
        read_dataset("~no_such_user_of_this_machine/photos")


def test_an_empty_split_says_which_there_are(put_images: Callable[..., Path]) -> None:
    dataset = read_dataset(put_images("train/a/1.png", "test/a/2.png", "test/a/3.png"))
    with pytest.raises(DataError, match=r"split 'val'; there are: train \(1\), test \(2\)"):
        dataset.items("val")


def test_classes_are_renamed_by_json_or_csv(put_images: Callable[..., Path]) -> None:
    root = put_images("n01_a/1.png", "n02/1.png", "n03_c/1.png")
    (root / "names.json").write_text('{"n02": "  red   fox ", "n01_a": "ape"}')
    (root / "names.csv").write_text("\ufeffn02,red fox\nn01_a,ape\n", encoding="utf-8")
    for file in ("names.json", "names.csv"):
        assert read_dataset(root, root / file).class_names == ("ape", "red fox", "n03 c")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"big_catt": "cat"}', "'big_catt' is no class of the data set; did you mean 'big_cat'"),
        ('{"xylophone": "cat"}', "'xylophone' is no class of the data set$"),
        ('{"ape": "  "}', "the name of 'ape' is empty"),
        ('{"ape": "Big Cat"}', r"\['ape', 'big_cat'\] have the same name 'big cat'.*--class-names"),
        ('{"ape": 3}', "expected a JSON object"),
        ('["ape"]', "expected a JSON object"),
        ('{"ape": ', "expected a readable JSON file"),
    ],
)
def test_bad_class_names_are_told_what_is_wrong(
    put_images: Callable[..., Path], content: str, named: str
) -> None:
    root = put_images("ape/1.png", "big_cat/1.png")
    (root / "names.json").write_text(content)
    with pytest.raises(DataError, match=named):
        read_dataset(root, root / "names.json")


def test_labels_are_aligned_to_the_order_of_a_model(put_images: Callable[..., Path]) -> None:
    root = put_images("train/ape/1.png", "train/bee/1.png", "test/bee/2.png")
    aligned = read_dataset(root, known_classes=("bee", "cow", "ape"))
    assert aligned.class_names == ("bee", "cow", "ape")
    assert aligned.items("train") == (Item("train/ape/1.png", 2), Item("train/bee/1.png", 0))
    assert aligned.items("test") == (Item("test/bee/2.png", 0),)
    assert read_dataset(root).items("test") == (Item("test/bee/2.png", 1),)
    with pytest.raises(DataError, match=r"classes \['ape'\] are not among the 1 of the model"):
        read_dataset(root, known_classes=("bee",))


@pytest.mark.parametrize(("count", "base"), [(1, 1), (3, 2), (4, 2)])
def test_base_is_the_first_half_of_the_classes_rounded_up_and_new_the_rest(
    count: int, base: int
) -> None:
    dataset = Dataset(Path(), tuple("abcd"[:count]), {})
    assert dataset.classes("all") == tuple(range(count))
    assert dataset.classes("base") == tuple(range(base))
    assert dataset.classes("new") == tuple(range(base, count))


def test_the_shared_cifar_folder_has_all_its_classes(cifar: Path) -> None:
    dataset = read_dataset(cifar)
    assert len(dataset.class_names) == 100
    assert {"aquarium fish", "train"} <= set(dataset.class_names)
    assert all(dataset.path(dataset.items(split)[0]).is_file() for split in SPLITS)


def test_other_names_for_the_validation_folder_are_known(put_images: Callable[..., Path]) -> None:
    root = put_images("train/cat/1.png", "train/dog/1.png", "valid/cat/2.png", "test/dog/3.png")
    dataset = read_dataset(root)
    assert [item.path for item in dataset.items("val")] == ["valid/cat/2.png"]
