"""The pictogram world as a data set: class folders in three splits, written from a seed.

Command: python -m examples.demo.world OUT
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from pathlib import Path

import click
import numpy as np

from .drawing import render
from .vocabulary import CLASSES, natural_name

__all__ = ["CLASSES", "VERSION", "main", "render", "write_world"]

VERSION = 1
NAMES = "class_names.json"  # class folders to names in natural word order


def _write_pictures(folder: Path, seed: int, counts: dict[str, int]) -> None:
    for number, (split, count) in enumerate(counts.items()):
        for name in CLASSES:
            home = folder / split / name.replace(" ", "_")
            home.mkdir(parents=True)
            for index in range(count):
                # One generator per picture: a picture does not depend on how many there are.
                key = (seed, VERSION, number, zlib.crc32(name.encode()), index)
                picture = render(name, np.random.default_rng(key))
                picture.save(home / f"{index + 1:04d}.png", compress_level=1)


def _is_world(folder: Path, marker: str) -> bool:
    """Return whether `folder` is the finished world of `marker`; raise FileExistsError if not."""
    if not folder.exists():
        return False
    file = folder / "world.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != marker:
        raise FileExistsError(
            f"{folder} exists and is not a world of this seed, version and size: "
            "remove it or choose another folder"
        )
    return True


def write_world(
    folder: Path | str, seed: int = 0, train: int = 20, val: int = 20, test: int = 40
) -> Path:
    """Write `folder`/{train,val,test}/<class>/0001.png … and return the folder.

    The counts are pictures per class. All is written beside `folder` and renamed at the end, so
    an interrupted call leaves no half world. A finished world of the same seed, version and
    counts is returned as it is; any other existing folder raises FileExistsError. Negative
    numbers raise ValueError.
    """
    folder = Path(folder)
    counts = {"train": train, "val": val, "test": test}
    if min(seed, *counts.values()) < 0:
        raise ValueError("the seed and the counts must not be negative")
    marker = json.dumps({"world": "pictograms", "version": VERSION, "seed": seed, **counts})
    if _is_world(folder, marker):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_pictures(stage / "world", seed, counts)
        names = {name.replace(" ", "_"): natural_name(name) for name in CLASSES}
        (stage / "world" / NAMES).write_text(json.dumps(names, indent=1), encoding="utf-8")
        (stage / "world" / "world.json").write_text(marker, encoding="utf-8")
        if not _is_world(folder, marker):
            (stage / "world").rename(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--train", default=20, show_default=True, type=click.IntRange(min=0))
@click.option("--val", default=20, show_default=True, type=click.IntRange(min=0))
@click.option("--test", default=40, show_default=True, type=click.IntRange(min=0))
def main(out: Path, seed: int, train: int, val: int, test: int) -> None:
    """Write the pictogram world to the folder OUT; the counts are pictures per class."""
    try:
        write_world(out, seed, train, val, test)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(CLASSES)} classes in {out}")


if __name__ == "__main__":
    main()
