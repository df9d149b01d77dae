"""Find photos in what people pass, and divide them into parts, always in the same way."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capt_deploy.bulk import storage
from capt_deploy.core.console import counted, say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import expand_home
from capt_deploy.data.folders import find_files, images_of
from capt_deploy.data.images import IMAGE_SUFFIXES
from capt_deploy.serving.labelling import find_images

_TABLE = ".parquet"
_SMALLEST = 256  # photos of a part: some batches, and little is redone after a crash
_MOST = 2000  # parts, so that a folder of results stays handy


@dataclass(frozen=True)
class Part:
    """Photos whose rows become one file: files by their names, or rows of a Parquet file."""

    number: int
    names: tuple[str, ...] = ()  # local paths and URIs
    table: str | None = None
    start: int = 0  # rows of the table
    stop: int = 0

    @property
    def photos(self) -> int:
        """Return how many photos there are in the part."""
        return len(self.names) or self.stop - self.start

    @property
    def begin(self) -> str:
        """Return the name of the first photo."""
        return self.names[0] if self.names else f"{self.table}, row {self.start}"

    def to_item(self) -> dict[str, Any]:
        """Return a row for Ray Data. Names are bytes, for not all are text, as Arrow wants it."""
        names = [os.fsencode(name) for name in self.names]
        return {**asdict(self), "names": names, "table": os.fsencode(self.table or "")}

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> "Part":
        """Return the part of a row for Ray Data."""
        numbers = {key: int(item[key]) for key in ("number", "start", "stop")}
        names = tuple(map(os.fsdecode, item["names"]))
        return cls(names=names, table=os.fsdecode(item["table"]) or None, **numbers)


def find_parts(paths: Iterable[str], listed: Iterable[str] = ()) -> list[Part]:
    """Return the parts of all photos in folders, patterns, Parquet files and stores.

    Files come first, each once and in the order of `find_images`, then rows of Parquet files. A
    Parquet file holds photos in a column `bytes` (and their names in `path`), or only names in
    `path`. A folder without photos may hold such files.

    Args:
        paths: local ones and URIs.
        listed: names that are taken as they are.

    Raises:
        DataError: a path does not exist, or nothing is left.
    """
    names: dict[str, None] = {}
    tables: list[tuple[str, int]] = []  # with their numbers of rows
    for path in paths:
        for file in _files_of(path):
            if Path(file).suffix.lower() != _TABLE:
                names[file] = None
                continue
            table = storage.open_table(file)
            if table.encoded:
                tables.append((file, table.rows))
                continue
            found = [name for name in storage.read_paths(file) if name]
            names |= dict.fromkeys(found)
            if unnamed := table.rows - len(found):
                say(f"note: {file}: left out {counted(unnamed, 'row')} without a path")
    names |= dict.fromkeys(name for name in listed if name)
    total = len(names) + sum(rows for _, rows in tables)
    if not total:
        raise DataError("found no image in what was given; expected images or folders of images")
    return [*_divide(list(names), tables, max(_SMALLEST, -(-total // _MOST)))]


def _files_of(path: str) -> list[str]:
    if storage.is_uri(path):
        files = storage.list_files(path)
        return files if files == [path] else _photos(files) or _tables(files, path)
    folder = expand_home(path)
    if not path or not folder.is_dir():
        return find_images([path])
    found = find_files(folder)
    files = [*map(str, found.paths)]
    if not _photos(files) and (tables := _tables(files, str(folder))):
        return tables
    return [*map(str, images_of(folder, found))]


def _photos(files: Iterable[str]) -> list[str]:
    return [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]


def _tables(files: Iterable[str], folder: str) -> list[str]:
    """Return the Parquet files in a folder; underscores hide files of systems that write them."""
    tables = [file for file in files if Path(file).suffix.lower() == _TABLE]
    return [file for file in tables if "/_" not in file[len(folder.rstrip("/")) :]]


def _divide(names: Sequence[str], tables: Iterable[tuple[str, int]], size: int) -> Iterator[Part]:
    number = 0
    for start in range(0, len(names), size):
        yield Part(number, tuple(names[start : start + size]))
        number += 1
    for table, rows in tables:
        for start in range(0, rows, size):
            yield Part(number, (), table, start, min(start + size, rows))
            number += 1


def fingerprint(parts: Iterable[Part]) -> str:
    """Return a hash of which photos are in which part, by their names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(asdict(part)).encode())
    return digest.hexdigest()
