"""Choose the images on which an export is checked and int8 is calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from capt_deploy.core.console import counted, say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home, sha256_file
from capt_deploy.data.datasets import SPLITS, read_dataset
from capt_deploy.data.folders import find_files
from capt_train.data.fewshot import FewShotSplit
from capt_train.run.folder import TunedModel

_HASHED = 16  # images of a data set


@dataclass(frozen=True)
class Photo:
    """An image file, with its class if that is known."""

    path: Path
    label: int = -1  # index of the class; -1 if it is not known


@dataclass(frozen=True)
class ExportPhotos:
    """Images for the gate, for the ranges of int8, and for temperatures of merged runs."""

    gate: tuple[Photo, ...]
    training: tuple[Photo, ...]
    validation: tuple[Photo, ...]


def choose_photos(
    models: Sequence[TunedModel], names: tuple[str, ...], gate_data: str | Path | None
) -> ExportPhotos:
    """Return the images of all runs, each once.

    Args:
        models: the runs.
        names: classes that labels refer to.
        gate_data: the runs' data set where it has moved, or other images for the gate: a labelled
            data set, or any folder of images.

    Raises:
        DataError: `gate_data` holds no images.
    """
    root = None if gate_data is None else expand_home(gate_data)
    moved = root is not None and all(_holds_images(m.split, _data_folder(root)) for m in models)
    train, validation = (
        _photos(models, names, split, root if moved else None) for split in ("train", "val")
    )
    gate = validation
    if root is not None and not moved:
        gate = _find_photos(root, names)
        if not any(photo.path.is_file() for photo in validation):
            validation = gate
    if not gate:  # int8 must not be judged by the images that it was calibrated on
        say("note: no validation images; the export is checked on half of the training images")
        train, gate = train[1::2] or train, train[::2]
    return ExportPhotos(gate, train, validation)


def spread_evenly(photos: Sequence[Photo], most: int) -> list[Photo]:
    """Return at most `most` photos, spread over the list, which is sorted by class."""
    places = torch.linspace(0, len(photos) - 1, min(len(photos), most)).round().long()
    return [photos[int(place)] for place in places]


def _data_folder(data: Path) -> Path:
    """Return the folder that paths of a data set are relative to."""
    return data if data.is_dir() else data.parent


def _photos(
    models: Sequence[TunedModel], names: Sequence[str], split: str, data: Path | None
) -> tuple[Photo, ...]:
    """Return the images of a split of all runs, which lies at `data` or where it was tuned on."""
    index = {name: place for place, name in enumerate(names)}
    photos: dict[Photo, None] = {}
    for model in models:
        folder = _data_folder(Path(model.config.data) if data is None else data)
        for item in getattr(model.split, split):
            photos[Photo(folder / item.path, index[model.class_names[item.label]])] = None
    return tuple(photos)


def _holds_images(split: FewShotSplit, folder: Path) -> bool:
    """Return whether a folder holds the images of a run: all names, and the hashes of some."""
    items = [*split.train, *split.val]
    if not all((folder / item.path).is_file() for item in items):
        return False
    hashed = items[:: max(1, len(items) // _HASHED)]
    return all(sha256_file(folder / item.path) == split.sha256[item.path] for item in hashed)


def _find_photos(root: Path, class_names: tuple[str, ...]) -> tuple[Photo, ...]:
    """Return the images of another data set; without labels if it has other classes."""
    try:
        dataset = read_dataset(root, known_classes=class_names)
        splits = (dataset.splits[name] for name in ("val", "test", *SPLITS))
        items = next(split for split in splits if split)
        say(f"note: checked on {counted(len(items), 'labelled image')} of another data set, {root}")
        return tuple(Photo(dataset.path(item), item.label) for item in items)
    except DataError:
        files = find_files(root).paths if root.is_dir() else []
    if not files:
        raise DataError(f"{root}: expected a data set or a folder of images, found no image")
    say(f"note: checked on {counted(len(files), 'image')} without known classes, below {root}")
    return tuple(Photo(file) for file in files)
