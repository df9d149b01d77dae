from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from capt_deploy.core.errors import DataError, RunError
from capt_deploy.data.datasets import Dataset, Item, read_dataset
from capt_train.data.fewshot import FewShotSplit, choose


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path) -> Path:
    """Return a copy of the photos that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def only_train(dataset: Dataset) -> Dataset:
    return replace(dataset, splits={"train": dataset.splits["train"], "val": (), "test": ()})


def per_class(items: tuple[Item, ...]) -> dict[int, int]:
    return dict(Counter(item.label for item in items))


def test_every_tuned_class_gives_as_many_training_images_as_shots(photos: Path) -> None:
    dataset = read_dataset(photos)
    split = choose(dataset, "all", shots=3, seed=1)
    assert per_class(split.train) == dict.fromkeys(range(4), 3)
    assert set(split.train) <= set(dataset.splits["train"])
    assert split.val == dataset.splits["val"]
    assert set(split.sha256) == {item.path for item in split.train + split.val}
    assert split.notices == (
        "12 training photos unused: --shots 3 takes at most 3 of each class; leave it out to use "
        "all",
    )


def test_without_a_number_of_shots_all_photos_are_used(photos: Path) -> None:
    dataset = read_dataset(photos)
    split = choose(dataset, "all", shots=None, seed=1)
    assert {*split.train} == {*dataset.splits["train"]}
    assert len(split.train) == 24
    assert split.val == dataset.splits["val"]
    assert split.notices == ()


def test_unused_photos_are_counted_apart_from_unreadable_ones(own_photos: Path) -> None:
    dataset = read_dataset(own_photos)
    (own_photos / "val" / "red_ball" / "0.png").unlink()
    split = choose(dataset, "all", shots=5, seed=1)
    (own_photos / split.train[0].path).write_bytes(b"no image")
    split = choose(dataset, "all", shots=5, seed=1)
    assert len(split.skipped) == 2
    assert any(notice.startswith("3 training photos unused") for notice in split.notices)


def test_the_choice_is_decided_by_the_seed(photos: Path) -> None:
    dataset = read_dataset(photos)
    first, again, other = (choose(dataset, "all", 3, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.fingerprint() == again.fingerprint()
    assert set(first.train) != set(other.train)
    assert first.fingerprint() != other.fingerprint()


def test_more_shots_of_the_same_seed_contain_the_fewer(photos: Path) -> None:
    dataset = read_dataset(photos)
    assert set(choose(dataset, "all", 2, 5).train) < set(choose(dataset, "all", 4, 5).train)


@pytest.mark.parametrize(("count", "base"), [(3, 2), (4, 2)])
def test_base_is_the_first_half_of_the_classes_rounded_up(
    count: int, base: int, own_photos: Path
) -> None:
    for split in ("train", "val", "test"):
        for folder in sorted((own_photos / split).iterdir())[count:]:
            shutil.rmtree(folder)
    split = choose(read_dataset(own_photos), "base", shots=2, seed=1)
    assert len(split.class_names) == count
    assert split.tuned == tuple(range(base))
    assert {item.label for item in split.train + split.val} == set(range(base))


def test_base_of_two_classes_is_refused_because_one_class_cannot_be_tuned(
    own_photos: Path,
) -> None:
    for split in ("train", "val", "test"):
        for folder in sorted((own_photos / split).iterdir())[2:]:
            shutil.rmtree(folder)
    with pytest.raises(DataError, match="at least two classes"):
        choose(read_dataset(own_photos), "base", shots=2, seed=1)


def test_a_class_with_fewer_images_than_shots_gives_all_and_is_named(own_photos: Path) -> None:
    for number in range(4):
        (own_photos / "train" / "red_ball" / f"{number}.png").unlink()
    split = choose(read_dataset(own_photos), "all", shots=5, seed=1)
    assert per_class(split.train) == {0: 5, 1: 5, 2: 5, 3: 2}
    assert split.notices[0] == "1 class has fewer than 5 images: red ball (2)"
    assert split.notices[1].startswith("3 training photos unused: --shots 5")


def test_an_unreadable_image_is_skipped_listed_and_replaced_by_the_next(own_photos: Path) -> None:
    before = choose(read_dataset(own_photos), "all", shots=2, seed=1)
    damaged = before.train[0]
    (own_photos / damaged.path).write_bytes(b"no image")
    after = choose(read_dataset(own_photos), "all", shots=2, seed=1)
    assert damaged not in after.train
    assert per_class(after.train) == per_class(before.train)
    assert set(before.train) - {damaged} < set(after.train)
    assert [skipped.path for skipped in after.skipped] == [damaged.path]
    assert any("1 file " in notice and damaged.path in notice for notice in after.notices)


def test_a_class_without_any_readable_training_image_is_named(own_photos: Path) -> None:
    for file in (own_photos / "train" / "red_ball").iterdir():
        file.write_bytes(b"")
    named = r"no readable training image of \['red ball'\] \(train/red_ball/\d\.png: .*image"
    with pytest.raises(DataError, match=named):
        choose(read_dataset(own_photos), "all", shots=2, seed=1)


def test_images_that_a_list_names_but_that_are_gone_are_skipped(own_photos: Path) -> None:
    rows = ["path,label,split"]
    for split in ("train", "val"):
        for file in sorted((own_photos / split).rglob("*.png")):
            rows.append(f"{file.relative_to(own_photos)},{file.parent.name},{split}")
    (own_photos / "photos.csv").write_text("\n".join(rows))
    gone = ["train/red_ball/0.png", "val/red_ball/0.png"]
    for name in gone:
        (own_photos / name).unlink()
    split = choose(read_dataset(own_photos / "photos.csv"), "all", shots=6, seed=1)
    assert sorted(skipped.path for skipped in split.skipped) == gone
    assert per_class(split.train) == {0: 6, 1: 6, 2: 6, 3: 5}
    assert per_class(split.val) == {0: 4, 1: 4, 2: 4, 3: 3}


def test_without_a_validation_split_every_photo_is_still_tuned_on(photos: Path) -> None:
    split = choose(only_train(read_dataset(photos)), "base", shots=None, seed=1)
    assert per_class(split.train) == {0: 6, 1: 6}
    assert split.val == ()
    assert split.notices == ()


def test_a_single_class_is_refused(own_photos: Path) -> None:
    (own_photos / "one" / "thing").mkdir(parents=True)
    shutil.copy(own_photos / "train" / "red_ball" / "0.png", own_photos / "one" / "thing")
    with pytest.raises(DataError, match="at least two classes to tune on, came 1"):
        choose(read_dataset(own_photos / "one"), "all", shots=2, seed=1)


def test_saved_and_loaded_it_is_the_same(photos: Path, tmp_path: Path) -> None:
    split = choose(only_train(read_dataset(photos)), "base", shots=2, seed=1)
    split.save(tmp_path / "split.json")
    assert FewShotSplit.load(tmp_path / "split.json") == split


@pytest.mark.parametrize("key", ["class_names", "tuned", "train", "val"])
def test_a_split_changed_by_hand_is_refused(key: str, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    choose(read_dataset(photos), "all", shots=2, seed=1).save(path)
    content = json.loads(path.read_text())
    content[key] = content[key][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="was changed after it was written"):
        FewShotSplit.load(path)


def test_a_split_that_leads_out_of_the_data_set_is_refused(tmp_path: Path) -> None:
    item = Item("../secret.png", 0)
    FewShotSplit(("a", "b"), (0, 1), (item,), (), {item.path: "0" * 64}).save(tmp_path / "s.json")
    with pytest.raises(RunError, match=r"s\.json"):
        FewShotSplit.load(tmp_path / "s.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train": 3, "val": []}', "null"])
def test_a_file_that_is_no_split_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(RunError, match=str(path)):
        FewShotSplit.load(path)


def test_check_accepts_the_data_wherever_it_lies(photos: Path, own_photos: Path) -> None:
    choose(read_dataset(photos), "all", shots=2, seed=1).check(read_dataset(own_photos))


def test_check_notices_changed_and_missing_images(own_photos: Path) -> None:
    split = choose(read_dataset(own_photos), "all", shots=2, seed=1)
    changed, gone = split.train[0].path, split.val[0].path
    shutil.copy(own_photos / split.train[1].path, own_photos / changed)
    (own_photos / gone).unlink()
    with pytest.raises(DataError, match=f"2 of the run's 24 images changed.*{changed}"):
        split.check(read_dataset(own_photos))


def test_check_notices_other_class_names(own_photos: Path) -> None:
    split = choose(read_dataset(own_photos), "all", shots=2, seed=1)
    (own_photos / "train" / "red_ball").rename(own_photos / "train" / "ruby_ball")
    with pytest.raises(DataError, match="5 class names are not the 4"):
        split.check(read_dataset(own_photos))
