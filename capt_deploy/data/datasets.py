"""Labelled images on disk, in the four forms that people have.

1. A folder with `train/`, `val/`, `test/`, each with a folder per class; `Training` and the like
   are understood.
2. One folder per class, without a split: the caller says which share is for testing. A hash of the
   path decides, so that adding or removing a photo moves hardly another one, and none of another
   class.
3. A CSV or JSONL file with `path,label[,split]`, paths relative to the file.
4. A CoOp `split_zhou_*.json`, or a folder with one. FGVC Aircraft, ImageNet and its variants are
   read as their authors lay them out.

Reading a data set lists its files; images are decoded when they are used. It is part of the runtime
because a bundle must be evaluated on machines without torch.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from capt_deploy.core.console import counted
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, is_file
from capt_deploy.core.text import composed, escaped
from capt_deploy.data.class_names import name_classes
from capt_deploy.data.field_layouts import (
    AIRCRAFT_LIST,
    is_imagenet,
    read_aircraft,
    read_imagenet,
)
from capt_deploy.data.folders import find_files, find_folders
from capt_deploy.data.images import HEIC_SUFFIXES, IMAGE_SUFFIXES, heic_obstacle
from capt_deploy.data.label_files import (
    Listing,
    Row,
    read_csv,
    read_jsonl,
    read_zhou,
    split_called,
)

SPLITS = ("train", "val", "test")
_READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".json": read_zhou}


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    path: str  # relative to the data set's root, with forward slashes
    label: int  # index into `class_names`


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Labelled images by split, with the names of their classes and the files left out."""

    root: Path
    class_names: tuple[str, ...]  # in label order
    splits: Mapping[str, tuple[Item, ...]]
    skipped: tuple[Skipped, ...] = ()

    def items(self, split: str) -> tuple[Item, ...]:
        """Return the images of a split.

        Raises:
            DataError: the data set has no image in that split.
        """
        items = self.splits.get(split, ())
        if not items:
            counts = {name: len(images) for name, images in self.splits.items() if images}
            listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
            raise DataError(f"{self.root}: no images in split {split!r}; there are: {listed}")
        return items

    def path(self, item: Item) -> Path:
        """Return the path of an image."""
        return self.root / item.path

    def classes(self, scope: str) -> tuple[int, ...]:
        """Return labels: `all`, `base` (the first half, rounded up) or `new` (the rest)."""
        count = len(self.class_names)
        half = (count + 1) // 2
        return tuple({"all": range(count), "base": range(half), "new": range(half, count)}[scope])

    def with_split(self, split: str, items: Sequence[Item]) -> "Dataset":
        """Return the data set with other images in one split."""
        return replace(self, splits={**self.splits, split: tuple(items)})

    def _aligned_to(self, class_names: tuple[str, ...]) -> "Dataset":
        """Return the data set with its labels in a model's order of classes."""
        # an old model has them as they came
        known = {composed(name): label for label, name in enumerate(class_names)}
        if unknown := set(self.class_names) - known.keys():
            raise DataError(
                f"{self.root}: classes {sorted(unknown)[:5]} are not among the "
                f"{len(class_names)} of the model; rename them with --class-names"
            )
        label = [known[name] for name in self.class_names]
        splits = {
            split: tuple(Item(item.path, label[item.label]) for item in items)
            for split, items in self.splits.items()
        }
        return replace(self, class_names=class_names, splits=splits)


def read_dataset(
    path: str | Path,
    class_names: str | Path | None = None,
    known_classes: tuple[str, ...] | None = None,
    *,
    test_share: float = 1.0,
) -> Dataset:
    """Read any of the four forms.

    Args:
        path: a folder, a `.csv` or `.jsonl` file, or a `split_zhou_*.json`.
        class_names: JSON `{label: name}` or a two-column CSV that renames classes; classes it
            does not mention keep their label with underscores turned to spaces.
        known_classes: of a model that is to be tested on the data; labels are then in its order,
            and `class_names` may rename classes that the data does not have.
        test_share: the share of each class that is the test split, where the data has no split of
            its own; the rest is for training. Below 1, each class keeps a training image.

    Raises:
        DataError: nothing usable is there, a class has no image, two classes share a name, or a
            class is not known to the model.
    """
    path = expand_home(path)
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected a data set (see --help)")
    if path.is_dir():
        root, listing = path, _read_folder(path)
    elif path.suffix.lower() in _READERS:
        root, listing = path.parent, _READERS[path.suffix.lower()](path)
    else:
        raise DataError(f"{path}: expected a folder, .csv, .jsonl or .json, came a file")
    rows, skipped = _images(path, listing)
    names = name_classes(path, listing.labels, class_names, known_classes is None)
    index = {label: position for position, label in enumerate(listing.labels)}
    dataset = Dataset(root, names, _split(rows, index, test_share), tuple(skipped))
    return dataset if known_classes is None else dataset._aligned_to(known_classes)


def _read_folder(path: Path) -> Listing:
    if (path / AIRCRAFT_LIST.format("train")).is_file():
        return read_aircraft(path)
    if is_imagenet(path):
        return read_imagenet(path)
    zhou = sorted(path.glob("split_zhou_*.json"))
    if len(zhou) > 1:
        raise DataError(f"{path}: holds {[file.name for file in zhou]}; pass one of them")
    folders, skipped = find_folders(path)
    splits = _split_folders(folders)
    # "train" may also be a class, of vehicles; and a lone test/ is enough to evaluate on
    named = {*splits.values()}
    if splits and (len(folders) == len(splits) or ("train" in named and len(named) > 1)):
        beside = "beside the folders of the splits, not in one"
        skipped |= {folder: beside for folder in folders if folder not in splits}
        return _list_files(path, splits, skipped)
    if zhou:
        return read_zhou(zhou[0])
    if splits and len(folders) > 1:
        raise DataError(
            f"{path}: expected splits or classes, came both: {[f.name for f in splits]} hold "
            f"folders of classes, as splits do, and there are {[f.name for f in folders][:5]}; "
            f"move the others into train/, or rename the classes"
        )
    if len(folders) == 1 and (inner := _split_folders(find_folders(folders[0]).paths)):
        raise DataError(
            f"{path}: holds {folders[0].name}/ alone, with {[f.name for f in inner]} in it; "
            f"pass {folders[0]}"
        )
    return _list_files(path, {path: None}, skipped)


def _split_folders(folders: Iterable[Path]) -> dict[Path, str]:
    """Return the folders that are called as a split and hold others, with the split."""
    called = {folder: split_called(folder.name) for folder in folders}
    return {f: split for f, split in called.items() if split and find_folders(f).paths}


def _list_files(
    root: Path, parents: Mapping[Path, str | None], passed_over: Mapping[Path, str]
) -> Listing:
    """List the files in the class folders of each parent, with the split of that parent."""
    labels: set[str] = set()
    rows: list[Row] = []
    skipped = dict(passed_over)
    for parent, split in parents.items():
        folders, others = find_folders(parent)
        skipped |= others
        for folder in folders:
            label = composed(folder.name)
            files, others = find_files(folder, root)
            labels.add(label)
            skipped |= others
            rows += [Row(file.relative_to(root).as_posix(), label, split) for file in files]
    reasons = (
        (escaped(path.relative_to(root).as_posix()), reason) for path, reason in skipped.items()
    )
    return Listing(tuple(sorted(labels)), tuple(rows), tuple(reasons))


def _images(path: Path, listing: Listing) -> tuple[list[Row], list[Skipped]]:
    """Return the listed images, and what is left out.

    Args:
        path: of the data set, for messages.
        listing: of its files.

    Raises:
        DataError: a class has no image, none is there, or one is listed twice.
    """
    rows: list[Row] = []
    skipped = [Skipped(*passed_over) for passed_over in listing.skipped]
    for row in listing.rows:
        if (shown := escaped(row.path)) != row.path:
            skipped.append(Skipped(shown, "its name is not valid UTF-8"))
        elif (suffix := Path(row.path).suffix.lower()) not in IMAGE_SUFFIXES:
            skipped.append(Skipped(row.path, "not an image by its name"))
        elif suffix in HEIC_SUFFIXES and (obstacle := heic_obstacle()):
            skipped.append(Skipped(row.path, obstacle))
        else:
            rows.append(row)
    images = Counter(row.label for row in rows)
    if not images:
        expected = "a folder per class, or train/, val/ and test/ with a folder per class in each"
        if not path.is_dir():
            expected = f"rows whose files end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise DataError(
            f"{path}: found no labelled images{_left_out(skipped)}; expected {expected}"
        )
    if empty := [label for label in listing.labels if not images[label]]:
        label = escaped(empty[0])
        left_out = [file for file in skipped if label in map(composed, Path(file.path).parts)]
        raise DataError(
            f"{path}: no image in class {empty}{_left_out(left_out)}; add some or remove the class"
        )
    if not path.is_dir():
        _check_list(path, rows)
    return rows, skipped


def _left_out(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    first = f"{skipped[0].path}: {skipped[0].reason}"
    return f" ({counted(len(skipped), 'file')} left out, e.g. {first})"


def _check_list(path: Path, rows: Sequence[Row]) -> None:
    """Check that one listed image is there, and none is listed twice.

    Raises:
        DataError: it is not so.
    """
    if not any(is_file(path.parent / row.path) for row in rows):
        raise DataError(
            f"{path}: none of its {counted(len(rows), 'image')} is there; paths start from the "
            f"list's folder: looked first for {(path.parent / rows[0].path).absolute()}"
        )
    labels: dict[str, str] = {}
    for row in rows:
        if (other := labels.setdefault(row.path, row.label)) != row.label:
            raise DataError(f"{path}: {row.path} is listed as {other!r} and as {row.label!r}")
    if len(labels) < len(rows):
        repeated, _ = Counter(row.path for row in rows).most_common(1)[0]
        number = counted(len(rows) - len(labels), "image")
        raise DataError(f"{path}: listed twice: {number}, e.g. {repeated}; list each one once")


def _split(
    rows: Iterable[Row], index: Mapping[str, int], test_share: float
) -> dict[str, tuple[Item, ...]]:
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    unsplit: dict[int, list[Item]] = {}
    for row in sorted(rows):
        item = Item(row.path, index[row.label])
        if row.split is None:
            unsplit.setdefault(item.label, []).append(item)
        else:
            splits[row.split].append(item)
    for items in unsplit.values():
        rest = sorted(items, key=lambda item: hashlib.sha256(item.path.encode()).digest())
        count = len(rest) if test_share == 1 else min(round(test_share * len(rest)), len(rest) - 1)
        splits["test"] += rest[:count]
        splits["train"] += rest[count:]
    return {
        split: tuple(sorted(items, key=lambda item: (item.label, item.path)))
        for split, items in splits.items()
    }
