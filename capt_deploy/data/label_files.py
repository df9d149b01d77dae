"""Files that list labelled images: CSV, JSONL and CoOp's `split_zhou_*.json`."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from capt_deploy.core.console import counted
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import is_file, is_inside, parse_json, read_json, read_text
from capt_deploy.core.text import composed

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_called(name: str) -> str | None:
    """Return the split that people mean by a name, in any case; None for any other name."""
    return _SPLIT_NAMES.get(name.strip().casefold())


class Row(NamedTuple):
    """One listed file; `split` is None where the list has no splits."""

    path: str
    label: str
    split: str | None


class Listing(NamedTuple):
    """Labels in label order, every file with its label, and what was passed over, with reasons."""

    labels: tuple[str, ...]
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def read_csv(path: Path) -> Listing:
    """Read a CSV with a header that names `path`, `label` and perhaps `split`."""
    reader = csv.DictReader(_lines(path))
    try:
        return _listing(path, ((reader.line_num, row) for row in reader))
    except csv.Error as cause:
        raise DataError(f"{path}: not a readable UTF-8 CSV file ({cause})") from cause


def read_jsonl(path: Path) -> Listing:
    """Read a file with one JSON object a line: `{"path", "label"[, "split"]}`."""
    return _listing(path, _json_lines(path))


def _lines(path: Path) -> list[str]:
    """Return lines with their ends; not `splitlines`, for JSON texts may hold other separators."""
    try:
        lines = list(StringIO(read_text(path), newline=""))
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: not a readable UTF-8 file ({cause})") from cause
    return lines[1:] if lines and lines[0].startswith("#TYPE ") else lines  # of PowerShell 5


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        value = parse_json(line, place, DataError) if line.strip() else None
        if value is not None:
            if not isinstance(value, dict):
                raise DataError(f'{place}: expected {{"path": …, "label": …}}')
            yield number, value


def read_pairs(path: Path) -> dict[str, str]:
    """Read a two-column CSV without a header: label, name."""
    pairs: dict[str, str] = {}
    try:
        rows = [row for row in csv.reader(_lines(path)) if row]
    except csv.Error as cause:
        raise DataError(f"{path}: not a readable UTF-8 CSV file ({cause})") from cause
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError(f"{path}, row {number}: expected label,name, came {row}")
        label = row[0].strip()
        if label in pairs:
            raise DataError(f"{path}, row {number}: {label!r} is named twice")
        pairs[label] = row[1]
    return pairs


def read_zhou(path: Path) -> Listing:
    """Read `{"train": [[path, label index, class name], …], "val": …, "test": …}`.

    Paths are relative to a folder beside the file (`images/`, `jpg/`, …), whose name is not in the
    file: it is the folder that holds the first image that is there.
    """
    content = read_json(path, DataError)
    if not isinstance(content, dict) or not set(content) <= {"train", "val", "test"}:
        raise DataError(f"{path}: expected a CoOp split with the keys train, val and test")
    names: dict[int, str] = {}
    rows: list[Row] = []
    for split, entries in content.items():
        if not isinstance(entries, list):
            raise DataError(f"{path}: expected a list of images for {split!r}")
        for entry in entries:
            try:
                file, index, name = entry
                index, name = int(index), composed(str(name))
            except (TypeError, ValueError, OverflowError) as cause:
                raise DataError(
                    f"{path}: expected [path, label, class name], came {entry}"
                ) from cause
            if names.setdefault(index, name) != name:
                raise DataError(f"{path}: label {index} is both {names[index]!r} and {name!r}")
            rows.append(Row(str(file).replace("\\", "/").removeprefix("/"), name, split))
    folder = _image_folder(path, rows)
    rows = [row._replace(path=_inside(path.parent, folder + row.path, str(path))) for row in rows]
    return Listing(tuple(names[index] for index in sorted(names)), tuple(rows))


def _image_folder(path: Path, rows: list[Row]) -> str:
    folders = ["", *(f"{name}/" for name in sorted(child.name for child in path.parent.iterdir()))]
    for row in rows:
        for folder in folders:
            if _found(path.parent / folder, row.path) is not None:
                return folder
    if not rows:
        return ""
    raise DataError(
        f"{path}: none of its {counted(len(rows), 'image')} lies beside the file or in a folder "
        f"beside it; "
        f"looked first for {(path.parent / rows[0].path).absolute()}"
    )


def _listing(path: Path, entries: Iterable[tuple[int, Mapping[str, Any]]]) -> Listing:
    rows = []
    for number, entry in entries:
        place = f"{path}, line {number}"
        file, label, split = (entry.get(key) for key in ("path", "label", "split"))
        if not file or label is None or label == "":
            raise DataError(f"{place}: expected the columns path and label, came {dict(entry)}")
        known = split_called(str(split)) if split else None
        if split and known is None:
            raise DataError(f"{place}: expected split train, val or test, came {split!r}")
        rows.append(Row(_inside(path.parent, str(file), place), composed(str(label)), known))
    if len({row.split is None for row in rows}) > 1:
        raise DataError(f"{path}: some rows have a split and some have none; fill in all or none")
    return Listing(tuple(sorted({row.label for row in rows})), tuple(rows))


def _inside(folder: Path, name: str, place: str) -> str:
    """Return a listed path with forward slashes, or refuse one that leads out of the folder."""
    if "\\" in name and not is_file(folder / name):
        name = name.replace("\\", "/")  # the list was made on Windows
    if not is_inside(name):
        raise DataError(
            f"{place}: {name!r} leads out of {folder}; "
            f"paths must be relative to the file and stay in its folder"
        )
    path = Path(name).as_posix()
    return _found(folder, path) or path


def _found(folder: Path, name: str) -> str | None:
    """Return the name of a file in the form of Unicode that it has on the disk, if it is there."""
    forms = [name] if name.isascii() else [name, *(normalize(f, name) for f in ("NFC", "NFD"))]
    return next((form for form in forms if is_file(folder / form)), None)
