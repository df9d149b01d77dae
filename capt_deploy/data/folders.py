"""Find the files of a folder as people have it: with links, system folders, results of capt."""

import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capt_deploy.core.console import counted, say
from capt_deploy.core.files import is_file
from capt_deploy.data.images import IMAGE_SUFFIXES

_MOST_SAID = 5
# Folders that systems put beside photos: Synology, QNAP, macOS, Linux, Windows
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("__macosx", "lost+found", "$recycle.bin", "system volume information"),
}
# Files by which a folder of results is known
_RESULTS = {
    "a run": ("config.json", "split.json"),
    "a bundle": ("manifest.json", "model.onnx"),
    "a report": ("report.html", "report.json"),
    "a comparison": ("cells.jsonl",),
    "predictions": ("_capt_predict.json",),
}


class Found(NamedTuple):
    """Files or folders, sorted, and why others were passed over."""

    paths: list[Path]
    skipped: dict[Path, str]


def find_files(folder: Path, root: Path | None = None) -> Found:
    """Return every file below a folder; links are followed.

    Passed over without a word is what a dot hides; with a reason: folders of the system and those
    that hold results of capt; what cannot be entered; links to a folder that is read anyway; and
    what is no file, such as a pipe.

    Args:
        folder: where to look.
        root: of the data set of which the folder is a part, all of which is read.
    """
    paths: list[Path] = []
    skipped: dict[Path, str] = {}
    top = (root or folder).resolve()
    entered: set[Path] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        target = current.resolve()
        if current != folder and (target in entered or _is_read(target, top, current)):
            skipped[current] = f"a link to {target}, whose files are there already"
            continue
        entered.add(target)
        for child, reason in _children(current):
            if reason:
                skipped[child] = reason
            elif not child.is_dir():
                paths.append(child)
            else:
                (links if child.is_symlink() else folders).append(child)
    return Found(sorted(paths), skipped)


def _is_read(target: Path, top: Path, path: Path) -> bool:
    """Tell whether a link leads to a folder that is read anyway, or to one around it."""
    if not path.is_symlink():
        return False
    if top.is_relative_to(target):
        return True
    inside = target.relative_to(top).parts if target.is_relative_to(top) else (".",)
    return not any(part.startswith(".") for part in inside)


def images_below(folder: Path) -> list[Path]:
    """Return the images below a folder by their names, sorted; say what else is there."""
    return images_of(folder, find_files(folder))


def images_of(folder: Path, found: Found) -> list[Path]:
    """Return the images among what was found below a folder; say what else is there."""
    files, skipped = found
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = Counter(
        file.suffix.lower() or file.name
        for file in files
        if file.suffix.lower() not in IMAGE_SUFFIXES
    )
    if others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in others.most_common(3))
        number = counted(others.total(), "file")
        say(f"note: {folder}: left out {number} not named as images: {kinds}")
    for path, reason in list(skipped.items())[:_MOST_SAID]:
        say(f"note: left out {path}: {reason}")
    if len(skipped) > _MOST_SAID:
        say(f"note: left out {len(skipped) - _MOST_SAID} more for such reasons")
    return images


def find_folders(folder: Path) -> Found:
    """Return the folders in a folder, links to folders included; passes over as `find_files`."""
    paths: list[Path] = []
    skipped: dict[Path, str] = {}
    for child, reason in _children(folder):
        if reason and not child.is_file():
            skipped[child] = reason
        elif child.is_dir():
            paths.append(child)
    return Found(sorted(paths), skipped)


def _children(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the visible files and folders in a folder, with the reason to pass each over, or ""."""
    try:
        children = sorted(folder.iterdir())
    except OSError as cause:
        yield folder, f"cannot be entered ({cause.strerror})"
        return
    for child in children:
        if not child.name.startswith("."):
            yield child, _why_not(child)


def _why_not(path: Path) -> str:
    try:
        kind = path.stat().st_mode
    except OSError as cause:  # a link to nothing, or to itself
        return f"cannot be read ({cause.strerror})"
    if stat.S_ISREG(kind):
        return ""
    if not stat.S_ISDIR(kind):
        return "neither a file nor a folder"
    if path.name.casefold() in _SYSTEM_FOLDERS:
        return "a folder of the system"
    for what, names in _RESULTS.items():
        if all(is_file(path / name) for name in names):
            return f"holds {what} of capt"
    return ""
