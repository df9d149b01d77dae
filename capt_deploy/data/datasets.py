"""Labelled image collections on disk, in the four forms that people have.

1. A folder with `train/`, `val/`, `test/`, each holding a folder per class.
2. One folder per class; split by a hash of the path, so that a photo added or removed moves
   hardly another one, and none of another class.
3. A CSV or JSONL file with `path,label[,split]`, paths relative to the file.
4. A CoOp `split_zhou_*.json`, or a folder that holds one.

Only names are looked at here; images are decoded when they are used. It lives in the runtime
because a bundle must be evaluated on machines that have no torch.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, visible_files
from capt_deploy.data import label_files
from capt_deploy.data.class_names import name_classes
from capt_deploy.data.images import IMAGE_SUFFIXES
from capt_deploy.data.label_files import Row

SPLITS = ("train", "val", "test")
_SHARES = {"test": 0.2, "val": 0.2}  # of every class, where the data has no split of its own


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
    """Labelled images by split; `class_names` are in label order."""

    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[Item, ...]]
    skipped: tuple[Skipped, ...] = ()

    def items(self, split: str) -> tuple[Item, ...]:
        """Return the images of a split.

        Raises:
            DataError: the data set has no image in that split.
        """
        items = self.splits.get(split, ())
        if not items:
            found = ", ".join(f"{name} ({len(of)})" for name, of in self.splits.items() if of)
            raise DataError(f"{self.root}: no images in split {split!r}; there are: {found}")
        return items

    def aligned_to(self, class_names: tuple[str, ...]) -> "Dataset":
        """Return the data set with its labels in a model's order of classes.

        Raises:
            DataError: it has a class that the model does not know.
        """
        if unknown := set(self.class_names) - set(class_names):
            raise DataError(
                f"{self.root}: classes {sorted(unknown)[:5]} are not among the "
                f"{len(class_names)} of the model; rename them with --class-names"
            )
        index = [class_names.index(name) for name in self.class_names]
        splits = {
            split: tuple(Item(item.path, index[item.label]) for item in items)
            for split, items in self.splits.items()
        }
        return replace(self, class_names=class_names, splits=splits)

    def path(self, item: Item) -> Path:
        """Return where the image lies."""
        return self.root / item.path


def read_dataset(
    path: str | Path, class_names: str | Path | None = None, *, strict_names: bool = True
) -> Dataset:
    """Read any of the four forms.

    Args:
        path: a folder, a `.csv` or `.jsonl` file, or a `split_zhou_*.json`.
        class_names: JSON `{label: name}` or a two-column CSV that renames classes; classes it
            does not mention keep their label with underscores turned to spaces.
        strict_names: whether it is an error to rename a class that is not there, as it is for
            training data, while test data may hold fewer classes.

    Raises:
        DataError: nothing usable is there, a class has no image, or two classes share a name.
    """
    path = expand_home(path)
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; expected a data set (see --help)")
    if path.is_dir():
        reader = _folder_reader(path)
        root = path
    else:
        readers: dict[str, Callable[[Path], label_files.Listing]] = {
            ".csv": label_files.read_csv,
            ".jsonl": label_files.read_jsonl,
            ".json": label_files.read_zhou,
        }
        if path.suffix.lower() not in readers:
            raise DataError(f"{path}: expected a folder, .csv, .jsonl or .json, came a file")
        reader, root = readers[path.suffix.lower()], path.parent
    return _build(root, reader(path), class_names, strict_names)


def _folder_reader(path: Path) -> Callable[[Path], label_files.Listing]:
    # "train" may also be a class, of vehicles; and a lone test/ is enough to evaluate on
    folders = _folders(path)
    splits = [
        folder for folder in folders if folder.name in label_files.SPLIT_NAMES and _folders(folder)
    ]
    if splits and (len(folders) == len(splits) or path / "train" in splits):
        return _read_split_folders
    zhou = sorted(path.glob("split_zhou_*.json"))
    if len(zhou) > 1:
        raise DataError(f"{path}: holds {[file.name for file in zhou]}; pass one of them")
    if zhou:
        return lambda _: label_files.read_zhou(zhou[0])
    return _read_class_folders


def _build(
    root: Path,
    listing: label_files.Listing,
    names_file: str | Path | None,
    strict_names: bool,
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
        left_out = f" ({len(skipped)} files that are no images)" if skipped else ""
        raise DataError(
            f"{root}: found no labelled images{left_out}; expected a folder per class, "
            f"or train/, val/ and test/ with a folder per class in each"
        )
    if empty := [label for label in listing.labels if not images[label]]:
        raise DataError(f"{root}: no image in class {empty}; add some or remove the class")
    names = name_classes(root, listing.labels, names_file, strict_names)
    repeated = [path for path, times in Counter(row.path for row in rows).items() if times > 1]
    if repeated:
        raise DataError(f"{root}: {len(repeated)} images are listed twice, e.g. {repeated[0]}")
    index = {label: position for position, label in enumerate(listing.labels)}
    return Dataset(root, names, _split(rows, index), tuple(skipped))


def _split(rows: Iterable[Row], index: Mapping[str, int]) -> dict[str, tuple[Item, ...]]:
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
        for split, share in _SHARES.items():
            count = min(round(share * len(items)), len(rest) - 1)
            splits[split] += rest[:count]
            rest = rest[count:]
        splits["train"] += rest
    return {
        split: tuple(sorted(of, key=lambda i: (i.label, i.path))) for split, of in splits.items()
    }


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _read_class_folders(path: Path) -> label_files.Listing:
    classes = _folders(path)
    rows = [
        Row(file.relative_to(path).as_posix(), folder.name, None)
        for folder in classes
        for file in visible_files(folder)
    ]
    return label_files.Listing(tuple(folder.name for folder in classes), tuple(rows))


def _read_split_folders(path: Path) -> label_files.Listing:
    present = [folder for folder in _folders(path) if folder.name in label_files.SPLIT_NAMES]
    labels = {folder.name for split in present for folder in _folders(split)}
    rows = [
        Row(file.relative_to(path).as_posix(), folder.name, label_files.SPLIT_NAMES[split.name])
        for split in present
        for folder in _folders(split)
        for file in visible_files(folder)
    ]
    return label_files.Listing(tuple(sorted(labels)), tuple(rows))
