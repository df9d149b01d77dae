"""Folders of data sets of the field that have a layout of their own: FGVC Aircraft, ImageNet.

The other nine that the papers use come with a `split_zhou_*.json`, see `label_files.read_zhou`.
"""

from pathlib import Path

from capt_deploy.core.errors import DataError
from capt_deploy.data.folders import find_files, find_folders
from capt_deploy.data.label_files import Listing, Row

AIRCRAFT_LIST = "images_variant_{}.txt"
IMAGENET_NAMES = "classnames.txt"
# ImageNet's own photos, then those of its variants: Sketch, A, R, V2
_IMAGENET_FOLDERS = (
    "images",
    "imagenet-a",
    "imagenet-r",
    "imagenetv2-matched-frequency-format-val",
)


def read_aircraft(folder: Path) -> Listing:
    """Read FGVC Aircraft's lists: `images_variant_SPLIT.txt`, a line `NUMBER VARIANT` a photo.

    Raises:
        DataError: a list is missing or a line is of another form.
    """
    rows = []
    for split in ("train", "val", "test"):
        path = folder / AIRCRAFT_LIST.format(split)
        for number, line in enumerate(_lines(path), start=1):
            image, _, variant = line.partition(" ")
            if not variant or "/" in image:
                raise DataError(f"{path}, line {number}: expected NUMBER VARIANT, came {line!r}")
            rows.append(Row(f"images/{image}.jpg", variant, split))
    return Listing(tuple(sorted({row.label for row in rows})), tuple(rows))


def is_imagenet(folder: Path) -> bool:
    """Tell whether a folder holds ImageNet or a variant, with the list of its class names."""
    has_photos = any((folder / name).is_dir() for name in _IMAGENET_FOLDERS)
    return has_photos and (folder / IMAGENET_NAMES).is_file()


def read_imagenet(folder: Path) -> Listing:
    """Read ImageNet or a variant: `classnames.txt` (`n01440764 tench`) and folders of classes.

    `images/train` is for training and `images/val` for testing, as the field does it; the photos of
    a variant are all for testing. Class folders have a WordNet id, or the place in the list of
    names, as in ImageNetV2. Where two classes share a name, the second has its id behind it.

    Raises:
        DataError: a name or the photos are missing.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(_lines(folder / IMAGENET_NAMES), start=1):
        identifier, _, name = line.partition(" ")
        if not name:
            raise DataError(
                f"{folder / IMAGENET_NAMES}, line {number}: expected an id and a name, "
                f"came {line!r}"
            )
        name = name.strip()
        names[identifier] = f"{name} ({identifier})" if name in names.values() else name
    places = [*names.values()]
    photos = next(folder / name for name in _IMAGENET_FOLDERS if (folder / name).is_dir())
    parents = {photos / "train": "train", photos / "val": "test"}
    if not (photos / "val").is_dir():
        parents = {photos: "test"}
    rows, skipped = [], dict[Path, str]()
    for parent, split in parents.items():
        folders, others = find_folders(parent)
        skipped |= others
        for classes in folders:
            label = names.get(classes.name)
            if label is None and classes.name.isdecimal() and int(classes.name) < len(places):
                label = places[int(classes.name)]
            if label is None:
                raise DataError(f"{classes}: no name for it in {folder / IMAGENET_NAMES}")
            files, others = find_files(classes)
            skipped |= others
            rows += [Row(file.relative_to(folder).as_posix(), label, split) for file in files]
    found = {row.label for row in rows}
    reasons = ((path.relative_to(folder).as_posix(), reason) for path, reason in skipped.items())
    return Listing(tuple(name for name in places if name in found), tuple(rows), tuple(reasons))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: expected a readable UTF-8 text file ({cause})") from cause
