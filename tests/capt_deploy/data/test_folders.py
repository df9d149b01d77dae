"""What is found in a folder, and what is passed over with which reason."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capt_deploy.data.folders import find_files, find_folders, images_below

posix = pytest.mark.skipif(os.name != "posix", reason="links and pipes need POSIX")


def names(root: Path, folder: str = ".") -> tuple[list[str], dict[str, str]]:
    """Return files and reasons by relative names."""
    files, skipped = find_files(root / folder)
    return (
        [file.relative_to(root).as_posix() for file in files],
        {path.relative_to(root).as_posix(): reason for path, reason in skipped.items()},
    )


def test_hidden_files_and_files_in_hidden_folders_are_not_visible(tmp_path: Path) -> None:
    root = tmp_path / ".root"
    for name in ("b.txt", "a/c.txt", ".d.txt", ".cache/e.txt", "a/.git/f/g.txt", "a.b/h.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert names(root) == (["a/c.txt", "a.b/h.txt", "b.txt"], {})


@posix
def test_links_are_followed_once_and_never_in_a_circle(put_images: Callable[..., Path]) -> None:
    root = put_images("archive/day1/1.png", "photos/ball/2.png", "photos/ball/deep/3.png")
    ball = root / "photos" / "ball"
    (ball / "day1").symlink_to(root / "archive" / "day1")
    (ball / "again").symlink_to(ball / "deep")
    (ball / "up").symlink_to(root)
    (ball / "self").symlink_to("self")
    (ball / "gone.png").symlink_to("nowhere")
    files, skipped = names(root, "photos/ball")
    assert files == ["photos/ball/2.png", "photos/ball/day1/1.png", "photos/ball/deep/3.png"]
    assert set(skipped) == {f"photos/ball/{name}" for name in ("again", "up", "self", "gone.png")}
    assert "files are there already" in skipped["photos/ball/again"]
    assert "files are there already" in skipped["photos/ball/up"]
    assert "cannot be read (No such file" in skipped["photos/ball/gone.png"]
    assert [path.name for path in find_folders(root / "photos").paths] == ["ball"]
    (root / "photos" / "day").symlink_to(root / "archive" / "day1")
    assert [path.name for path in find_folders(root / "photos").paths] == ["ball", "day"]


@posix
def test_a_link_into_the_same_data_is_passed_over(put_images: Callable[..., Path]) -> None:
    root = put_images("train/a/1.png", "test/a/2.png", ".store/3.png")
    (root / "train" / "a" / "more").symlink_to(root / "test" / "a")
    (root / "train" / "a" / "kept").symlink_to(root / ".store")  # which is read by no other way
    files, skipped = find_files(root / "train" / "a", root)
    assert [file.name for file in files] == ["1.png", "3.png"]
    assert [path.name for path in skipped] == ["more"]


@posix
def test_what_is_no_file_is_not_opened(put_images: Callable[..., Path]) -> None:
    root = put_images("a/1.png")
    os.mkfifo(root / "a" / "2.png")
    assert names(root) == (["a/1.png"], {"a/2.png": "neither a file nor a folder"})


def test_a_folder_that_cannot_be_entered_is_named(
    put_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put_images("a/1.png", "locked/2.png")
    iterdir = Path.iterdir

    def refusing(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    assert names(root) == (["a/1.png"], {"locked": "cannot be entered (Permission denied)"})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["x/config.json", "x/split.json", "x/1.png"], "holds a run of capt"),
        (["x/manifest.json", "x/model.onnx", "x/1.png"], "holds a bundle of capt"),
        (["x/report.html", "x/report.json", "x/1.png"], "holds a report of capt"),
        (["x/cells.jsonl", "x/photos-accuracy.png"], "holds a comparison of capt"),
        (["x/config.json", "x/1.png"], ""),
        (["@eaDir/1.png"], "a folder of the system"),
        (["Lost+Found/1.png"], "a folder of the system"),
        (["$RECYCLE.BIN/1.png"], "a folder of the system"),
    ],
)
def test_system_folders_and_results_are_passed_over(
    put_images: Callable[..., Path], files: list[str], reason: str
) -> None:
    root = put_images(*files)
    assert set(find_files(root).skipped.values()) == ({reason} if reason else set())
    assert bool(find_files(root).paths) != bool(reason)
    assert bool(find_folders(root).paths) != bool(reason)


def test_what_is_left_out_beside_images_is_said(
    put_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = put_images("1.JPG", "a/2.png", "a/notes.txt", "b.txt", "c.mp4", "@eaDir/3.png")
    logger = logging.getLogger("capt")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", logger="capt"):
            found = images_below(root)
    finally:
        logger.removeHandler(caplog.handler)
    assert [path.name for path in found] == ["1.JPG", "2.png"]
    assert "left out 3 files not named as images: .txt (2), .mp4 (1)" in caplog.text
    assert "@eaDir: a folder of the system" in caplog.text
