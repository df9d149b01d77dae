"""Labelled images on disk, in the four forms that people have.

1. A folder with `train/`, `val/`, `test/`, each with a folder per class.
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
from capt_deploy.core.files import expand_home, visible_files
from capt_deploy.data.class_names import name_classes
from capt_deploy.data.field_layouts import (
    AIRCRAFT_LIST,
    is_imagenet,
    read_aircraft,
    read_imagenet,
)
from capt_deploy.data.images import IMAGE_SUFFIXES
from capt_deploy.data.label_files import (
    SPLIT_NAMES,
    Listing,
    Row,
    read_csv,
    read_jsonl,
    read_zhou,
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
        if unknown := set(self.class_names) - set(class_names):
            raise DataError(
                f"{self.root}: classes {sorted(unknown)[:5]} are not among the "
                f"{len(class_names)} of the model; rename them with --class-names"
            )
        label = [class_names.index(name) for name in self.class_names]
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
    dataset = _build(
        root, listing, class_names, strict_names=known_classes is None, test_share=test_share
    )
    return dataset if known_classes is None else dataset._aligned_to(known_classes)


def _read_folder(path: Path) -> Listing:
    if (path / AIRCRAFT_LIST.format("train")).is_file():
        return read_aircraft(path)
    if is_imagenet(path):
        return read_imagenet(path)
    # "train" may also be a class, of vehicles; and a lone test/ is enough to evaluate on
    folders = _folders(path)
    splits = [folder for folder in folders if folder.name in SPLIT_NAMES and _folders(folder)]
    if splits and (len(folders) == len(splits) or path / "train" in splits):
        return _list_files(path, {folder: SPLIT_NAMES[folder.name] for folder in splits})
    zhou = sorted(path.glob("split_zhou_*.json"))
    if len(zhou) > 1:
        raise DataError(f"{path}: holds {[file.name for file in zhou]}; pass one of them")
    return read_zhou(zhou[0]) if zhou else _list_files(path, {path: None})


def _list_files(root: Path, parents: Mapping[Path, str | None]) -> Listing:
    """List the files in the class folders of each parent, with the split of that parent."""
    classes = [(folder, split) for parent, split in parents.items() for folder in _folders(parent)]
    rows = [
        Row(file.relative_to(root).as_posix(), folder.name, split)
        for folder, split in classes
        for file in visible_files(folder)
    ]
    return Listing(tuple(sorted({folder.name for folder, _ in classes})), tuple(rows))


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _build(
    root: Path,
    listing: Listing,
    names_file: str | Path | None,
    strict_names: bool,
    test_share: float,
) -> Dataset:
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for row in listing.rows:
        if any("\ud800" <= character <= "\udfff" for character in row.path):
            printable = row.path.encode("utf-8", "backslashreplace").decode()
            skipped.append(Skipped(printable, "its name is not valid UTF-8"))
        elif Path(row.path).suffix.lower() in IMAGE_SUFFIXES:
            rows.append(row)
        else:
            skipped.append(Skipped(row.path, "not an image by its name"))
    images = Counter(row.label for row in rows)
    if not images:
        left_out = f" ({counted(len(skipped), 'file')} left out)" if skipped else ""
        raise DataError(
            f"{root}: found no labelled images{left_out}; expected a folder per class, "
            f"or train/, val/ and test/ with a folder per class in each"
        )
    if empty := [label for label in listing.labels if not images[label]]:
        raise DataError(f"{root}: no image in class {empty}; add some or remove the class")
    names = name_classes(root, listing.labels, names_file, strict_names)
    repeated = [path for path, times in Counter(row.path for row in rows).items() if times > 1]
    if repeated:
        raise DataError(
            f"{root}: listed twice: {counted(len(repeated), 'image')}, e.g. {repeated[0]}"
        )
    index = {label: position for position, label in enumerate(listing.labels)}
    return Dataset(root, names, _split(rows, index, test_share), tuple(skipped))


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
