"""Finding images in what people pass, and a row for each of them whatever it holds."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.manifest import Graph, Manifest
from capt_deploy.bundle.read import Bundle
from capt_deploy.core.errors import DataError, ImageError
from capt_deploy.data.preprocess import PreprocessConfig
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.labelling import LabelledFile, find_images, label_files, read_names
from capt_deploy.serving.prediction import Prediction
from capt_deploy.serving.predictor import Predictor


class ColourBackend:
    """A backend that needs no graph: the probability of a colour is its share of the light."""

    name = "colour"
    device = "cpu"

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        light = images.reshape(len(images), -1, 3).mean(axis=1, dtype=np.float32) + 1
        shares = light / light.sum(axis=1, keepdims=True)
        return Outputs(np.log(shares), shares, shares)


@pytest.fixture
def classifier() -> Classifier:
    manifest = Manifest(
        class_names=("red", "green", "blue"),
        tuned=(True, True, True),
        preprocess=PreprocessConfig((4, 4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        graphs={"fp32": Graph("model.onnx", 20)},
        calibration={"fp32": {"temperature": 1.0}},
        confusion_pairs=(),
        training={},
    )
    return Classifier(Predictor(Bundle(Path("colours.capt"), manifest)), ColourBackend(), "fp32")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, colour in (("r.png", (200, 50, 0)), ("g.png", (0, 250, 0)), ("b.png", (0, 49, 99))):
        Image.new("RGB", (7, 5), colour).save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_every_file_gets_its_row_in_order_and_a_broken_one_its_error(
    classifier: Classifier, photos: Path, batch_size: int
) -> None:
    names = ["g.png", "text.jpg", "b.png", "gone.png", "r.png", "g.png"]
    files = [str(photos / name) for name in names]
    rows = list(label_files(classifier, files, 2, batch_size))
    assert [row.path for row in rows] == files
    labels = [None if row.error else row.result.label for row in rows]
    assert labels == ["green", None, "blue", None, "red", "green"]
    assert [row.error is None for row in rows] == [label is not None for label in labels]
    assert "text.jpg: no image of a format" in rows[1].error
    assert "gone.png: no such file" in rows[3].error


def test_a_row_reads_the_same_as_json_csv_and_text(classifier: Classifier, photos: Path) -> None:
    path = str(photos / "b.png")  # light 1, 50, 100 of 151
    (row,) = label_files(classifier, [path], 2, 8)
    value = json.loads(json.dumps(row.to_dict()))
    assert value["confidence"] == pytest.approx(100 / 151, abs=1e-6)
    assert [top["label"] for top in value["top_k"]] == ["blue", "green"]
    assert value["top_k"][1]["confidence"] == pytest.approx(50 / 151, abs=1e-6)
    assert (value["path"], value["label"]) == (path, "blue")
    # of a bundle without validation images
    assert (value["prediction_set"], value["rejected"], value["familiarity"]) == (None,) * 3
    assert row.fields() == (path, "blue", "0.662252", "", "", "")
    assert str(row) == f"{path}: blue 0.662, green 0.331"


def test_an_error_row_reads_the_same_as_json_csv_and_text(
    classifier: Classifier, photos: Path
) -> None:
    path = str(photos / "gone.png")
    (row,) = label_files(classifier, [path], 2, 8)
    assert row.to_dict() == {"path": path, "error": f"{path}: no such file"}
    assert row.fields() == (path, "", "", f"{path}: no such file", "", "")
    assert str(row).startswith(f"{path}: error: ")


def test_more_classes_than_there_are_are_not_invented(classifier: Classifier, photos: Path) -> None:
    (row,) = label_files(classifier, [str(photos / "r.png")], 9, 8)
    assert [top["label"] for top in row.to_dict()["top_k"]] == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("familiarity", "rejected", "shown"),
    [
        (0.003, None, " (unfamiliar: 0.003)"),
        (0.003, True, " (unfamiliar: 0.003) (rejected)"),
        (0.4, None, ""),
        (None, None, ""),
    ],
)
def test_an_unfamiliar_image_is_marked_in_text(
    familiarity: float | None, rejected: bool | None, shown: str
) -> None:
    shares = np.array([0.98, 0.02], np.float32)
    prediction = Prediction(
        "cat", 0.98, shares, ("cat", "dog"), None, rejected, familiarity=familiarity
    )
    assert str(LabelledFile("a.jpg", prediction, 1)) == f"a.jpg: cat 0.980{shown}"
    assert LabelledFile("a.jpg", prediction, 1).to_dict()["familiarity"] == familiarity


def found(root: Path, *paths: str) -> list[str]:
    return [
        Path(file).relative_to(root).as_posix()
        for file in find_images(str(root / p) for p in paths)
    ]


def test_folders_are_searched_for_visible_images(put_images: Callable[..., Path]) -> None:
    root = put_images(
        "b.png",
        "a/1.JPG",
        "a/deep/2.webp",
        "a/notes.txt",
        "a/.2.png",
        "a/.cache/3.png",
        "a.jpg/4.png",
    )
    assert found(root, ".") == ["a/1.JPG", "a/deep/2.webp", "a.jpg/4.png", "b.png"]


def test_order_is_kept_and_nothing_comes_twice(put_images: Callable[..., Path]) -> None:
    root = put_images("b.png", "a/1.png", "a/2.png")
    assert found(root, "b.png", "a", "a/1.png", "./b.png") == ["b.png", "a/1.png", "a/2.png"]


def test_patterns_are_expanded_to_files(put_images: Callable[..., Path]) -> None:
    root = put_images("a/1.png", "a/2.jpg", "a/deep/3.png", "b.png")
    assert found(root, "a/*.png") == ["a/1.png"]
    assert found(root, "**/*.png") == ["a/1.png", "a/deep/3.png", "b.png"]
    assert found(root, "a/*") == ["a/1.png", "a/2.jpg"]


def test_a_file_given_by_name_is_taken_whatever_it_is_called(
    put_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put_images("no_suffix", ".hidden.png", "odd[1].png", "~nobody.png")
    assert found(root, "no_suffix", ".hidden.png", "odd[1].png") == [
        "no_suffix",
        ".hidden.png",
        "odd[1].png",
    ]
    monkeypatch.chdir(root)
    assert find_images(["~nobody.png"]) == ["~nobody.png"]


@pytest.mark.parametrize("missing", ["gone.png", "gone/", "*.tif"])
def test_what_does_not_exist_is_named(put_images: Callable[..., Path], missing: str) -> None:
    with pytest.raises(DataError, match=r"(gone|\*\.tif).*: no such file, folder, or pattern"):
        find_images([str(put_images("a.png")), str(put_images() / missing)])


def test_names_from_a_list_are_taken_as_they_are(put_images: Callable[..., Path]) -> None:
    here = str(put_images("a.png") / "a.png")
    assert find_images([], ["gone.png", here, ""]) == ["gone.png", here]
    with pytest.raises(DataError, match="found no image"):
        find_images([], [""])


@pytest.mark.parametrize(
    "lines",
    [
        "a.png\nkäse x.png\n".encode(),
        b"\xef\xbb\xbf" + "a.png\r\nkäse x.png\r\n".encode(),
        "a.png\r\nkäse x.png\r\n".encode("utf-16"),
    ],
)
def test_lists_of_names_are_read_as_shells_write_them(lines: bytes) -> None:
    assert read_names(lines) == ["a.png", "käse x.png", ""]


def test_a_name_that_is_no_text_stays_the_name_of_its_file(tmp_path: Path) -> None:
    (name, _) = read_names(os.fsencode(tmp_path) + b"/caf\xe9.png\n")
    Path(name).touch()
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"caf\xe9.png"]
    row = LabelledFile(name, ImageError(f"{name}: damaged"), 1)
    assert "caf\\udce9.png" in row.shown_path and "caf\\udce9" in str(row.error)
    for shown in (str(row), json.dumps(row.to_dict(), ensure_ascii=False), *row.fields()):
        shown.encode()


def test_an_empty_path_does_not_mean_the_current_folder() -> None:
    with pytest.raises(DataError, match="empty"):
        find_images([""])


def test_folders_without_an_image_are_refused(put_images: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="found no image"):
        find_images([str(put_images("a/notes.txt"))])
    with pytest.raises(DataError, match="found no image"):
        find_images([])
