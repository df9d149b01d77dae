"""The least probable labels come first; copies are found however they were saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt_deploy.core.errors import RunError
from capt_train.data.suspects import Copy, Suspects, find_copies, rank_labels

NAMES = ("otter", "beaver", "mink")


def ranked(count: int = 200) -> tuple[Suspects, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(3), count)
    labels = draw.integers(0, 3, count)
    paths = [f"train/{row}.jpg" for row in range(count)]
    wrong = 1 - probabilities[np.arange(count), labels]
    photos = rank_labels(paths, ["train"] * count, labels, probabilities, wrong, NAMES)
    copy = Copy("a.jpg", "b.jpg", ("train", "val"), ("otter", "otter"), 0.999)
    return Suspects(photos, 0.1, (copy,)), probabilities, labels


def test_the_ranking_is_that_of_cleanlab() -> None:
    from cleanlab.rank import get_label_quality_scores

    suspects, probabilities, labels = ranked()
    quality = get_label_quality_scores(
        labels, probabilities, method="self_confidence", adjust_pred_probs=False
    )
    expected = [f"train/{row}.jpg" for row in np.argsort(quality, kind="stable")]
    assert [photo.path for photo in suspects.labels] == expected
    first = suspects.labels[0]
    row = int(first.path.removeprefix("train/").removesuffix(".jpg"))
    assert first.label == NAMES[labels[row]]
    assert first.likely == NAMES[probabilities[row].argmax()]
    assert first.p_label == probabilities[row, labels[row]]
    assert suspects.probably_wrong == (quality < 0.5).sum()


def test_they_survive_their_file(tmp_path: Path) -> None:
    suspects, *_ = ranked(5)
    suspects.save(tmp_path / "suspects.json")
    assert Suspects.load(tmp_path / "suspects.json") == suspects


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("labels", [{"path": "a.jpg"}]),
        ("labels", 5),
        ("copies", [{"first": "a"}]),
        ("wrong_share", "much"),
        ("path", "../../etc/passwd"),
    ],
)
def test_damaged_files_are_refused(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "suspects.json"
    ranked(2)[0].save(path)
    content = json.loads(path.read_text())
    (content["labels"][0] if key == "path" else content)[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="not as capt-train writes it"):
        Suspects.load(path)


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
