"""Copies are found however they were saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt_train.data.copies import Copy, find_copies


@pytest.fixture
def scene() -> Image.Image:
    draw = np.random.default_rng(3)
    small = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8))
    return small.resize((320, 240), Image.Resampling.BICUBIC)


def copies_of(files: list[Path], embeddings: np.ndarray, among: int = 9) -> tuple[Copy, ...]:
    return find_copies(
        files, embeddings, lambda row: (files[row].name, "train", "otter"), min(among, len(files))
    )


def test_copies_are_found_shrunk_recompressed_and_brightened(
    scene: Image.Image, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("a.png", "b.jpg", "c.png", "d.png", "e.png", "f.png")]
    scene.save(files[0])
    scene.save(files[1], quality=40)
    scene.resize((150, 110)).save(files[2])
    scene.point(lambda value: min(255, round(1.1 * value))).save(files[3])
    scene.rotate(180).save(files[4])
    files[5].write_bytes(b"no photo")
    same = np.tile(np.eye(4)[0], (6, 1))
    found = {(copy.first, copy.second) for copy in copies_of(files, same)}
    names = [file.name for file in files[:4]]
    assert found == {(a, b) for a in names for b in names if a < b}
    assert all(0.99 <= copy.similarity <= 1 for copy in copies_of(files, same))
    # photos whose embeddings differ are not compared; nor are the last ones with each other
    assert not copies_of(files, np.eye(6))
    assert {copy.first for copy in copies_of(files, same, among=1)} == {"a.png"}


def test_plain_photos_are_no_copies(tmp_path: Path) -> None:
    files = [tmp_path / "white.png", tmp_path / "grey.png"]
    for file, grey in zip(files, (255, 128), strict=True):
        Image.new("RGB", (64, 64), (grey,) * 3).save(file)
    assert not copies_of(files, np.ones((2, 1)))


def test_contradictions_come_first(scene: Image.Image, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        scene.save(file)
    rows = [("0.png", "train", "otter"), ("1.png", "train", "otter"), ("2.png", "val", "mink")]
    found = find_copies(files, np.ones((3, 1)), rows.__getitem__, 3)
    assert [copy.problem for copy in found] == ["two labels", "two labels", ""]
    across = Copy("0.png", "1.png", ("train", "test"), ("otter", "otter"), 1.0)
    assert across.problem == "two splits"


def test_one_photo_has_no_copy(scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "a.png")
    assert not copies_of([tmp_path / "a.png"], np.ones((1, 1)))
