"""The C++ example is built, and its answers are compared with the package's own."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from benchmarks.cpp import compare
from capt_deploy.data.preprocess import PreprocessConfig, preprocess
from tests.examples import onnxruntime_sdk
from tests.examples.odd_photos import chunk, exif, smooth, write_odd_photos
from tests.examples.onnxruntime_sdk import make_sdk, miss
from tests.examples.pixel_bundle import write_pixel_bundle

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
HEADERS = "#include <cstdio>\n#include <jpeglib.h>\n#include <png.h>\n"
MANY = 500
CONFIGS: dict[str, dict[str, Any]] = {
    "square": {"size": (24, 24)},
    "bilinear": {"size": (24, 24), "interpolation": "bilinear"},
    "rectangle": {"size": (20, 28), "interpolation": "bilinear"},
    "border": {"size": (25, 24), "resize_mode": "longest", "fill_color": 7},
    "squash": {"size": (16, 30), "resize_mode": "squash"},
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program, built as README.md says."""
    if int(PIL.__version__.split(".")[0]) < 13:
        miss("Pillow before 13 resizes in another order")
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, compiler = shutil.which("cmake", path=places), shutil.which("c++")
    if cmake is None or compiler is None:
        miss("CMake or a C++ compiler is missing")
    command = [compiler, "-E", "-x", "c++", "-"]
    if subprocess.run(command, input=HEADERS.encode(), capture_output=True, check=False).returncode:
        miss("libjpeg-dev and libpng-dev are not installed")
    folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={make_sdk(folder)}"
    build = folder / "build"
    jobs = ["--parallel", "2"]
    for step in (["-S", str(SOURCE), "-B", str(build), prefix], ["--build", str(build), *jobs]):
        done = subprocess.run([cmake, *step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr, done.stderr
    return build / "capt_classify"


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip), ("1", pytest.fail)])
def test_what_is_not_installed_fails_in_ci_alone(
    ci: str, outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPT_CI", ci)
    monkeypatch.setattr(onnxruntime_sdk, "KEYS", tmp_path / "none")
    with pytest.raises(outcome.Exception, match="this is no Debian"):
        make_sdk(tmp_path)


def run(*command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def answers(program: Path, bundle: Path, photos: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the lines for photos that can all be read."""
    done = run(program, bundle, *photos)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(photo) for photo in photos]
    return lines


@pytest.fixture(scope="module")
def odd_photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("odd")
    write_odd_photos(folder)
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_pixels_are_those_of_the_package(
    program: Path, odd_photos: list[Path], tmp_path: Path, name: str
) -> None:
    thirds = (1 / 3,) * 3
    config = PreprocessConfig(**{"mean": thirds, "std": thirds, **CONFIGS[name]})
    bundle = write_pixel_bundle(tmp_path / "pixels.capt", config)
    different = {}
    for line, photo in zip(answers(program, bundle, odd_photos), odd_photos, strict=True):
        pixels = np.rint(np.array(line["probabilities"]) * 255).reshape(*config.size, 3)
        difference = np.abs(pixels - preprocess(photo, config)).max()
        if difference:
            different[photo.name] = difference
    assert different == {}


def test_a_long_strip_is_cropped_before_it_is_resized(program: Path, tmp_path: Path) -> None:
    strip = np.random.default_rng(0).integers(0, 256, (60_000, 1, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    config = PreprocessConfig((36, 36), (0.5,) * 3, (0.5,) * 3)
    bundle = write_pixel_bundle(tmp_path / "pixels.capt", config)
    (line,) = answers(program, bundle, [tmp_path / "strip.png"])
    pixels = np.rint(np.array(line["probabilities"]) * 255).reshape(36, 36, 3)
    assert np.array_equal(pixels, preprocess(tmp_path / "strip.png", config))


def test_weights_in_a_second_file_are_read_and_checked(program: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (7, 8, 9)).save(tmp_path / "photo.png")
    config = PreprocessConfig((2, 2), (0.5,) * 3, (0.5,) * 3)
    bundle = write_pixel_bundle(tmp_path / "pixels.capt", config, "model.onnx.data")
    (line,) = answers(program, bundle, [tmp_path / "photo.png"])
    assert np.allclose(line["probabilities"][:3], np.array([7, 8, 9]) / 255)
    (bundle / "model.onnx.data").write_bytes(np.float32(254).tobytes())
    done = run(program, bundle, tmp_path / "photo.png")
    assert done.returncode == 2 and "model.onnx.data is not the file" in done.stderr


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return photos of real clothes; where these are not there, of noise."""
    clothes = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothes"
    photos = sorted(clothes.glob("t*/*/*.jpg"))[:MANY]
    if len(photos) == MANY:
        return photos
    folder = tmp_path_factory.mktemp("many")
    for number in range(MANY):
        image = Image.fromarray(smooth(20 + number % 31, 20 + number % 17, seed=number))
        image.save(folder / f"{number}.jpg", exif=exif(1 + number % 8))
    return sorted(folder.iterdir())


def test_the_answers_for_500_photos_are_those_of_the_package(
    program: Path, golden: Path, many_photos: list[Path]
) -> None:
    result = compare(program, golden, [str(photo) for photo in many_photos])
    assert (result["photos"], result["other_labels"]) == (MANY, 0)
    assert result["labels"] > 2
    assert result["largest_difference"] <= 1e-4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def many_scans(path: Path) -> None:
    """Repeat the last scan of a progressive JPEG."""
    data = path.read_bytes()
    start = data.rindex(b"\xff\xda")
    path.write_bytes(data[:start] + data[start:-2] * 101 + data[-2:])


def test_each_bad_photo_has_a_line_with_its_error(
    program: Path, golden: Path, tmp_path: Path
) -> None:
    photo = Image.fromarray(smooth(90, 60))
    photo.save(tmp_path / "good.jpg")
    for name, options in (("cut.jpg", {}), ("cut.png", {}), ("scans.jpg", {"progressive": True})):
        photo.save(tmp_path / name, **options)
    cut(tmp_path / "cut.jpg"), cut(tmp_path / "cut.png"), many_scans(tmp_path / "scans.jpg")
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "empty.png").write_bytes(b"")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "cut.jpg": "damaged JPEG",
        "cut.png": "damaged PNG",
        "scans.jpg": "more than 100 scans",
        "text.jpg": "no JPEG or PNG",
        "empty.png": "no JPEG or PNG",
        "bomb.png": "too many pixels",
        "pipe.jpg": "no regular file",
        "missing.jpg": "no such file",
    }
    names = ["good.jpg", *reasons, "good.jpg"]
    done = run(program, golden, *(tmp_path / name for name in names))
    assert (done.returncode, done.stderr) == (1, "")
    first, *bad, last = (json.loads(line) for line in done.stdout.splitlines())
    assert first == last and "error" not in first
    for line, (name, reason) in zip(bad, reasons.items(), strict=True):
        assert line.keys() == {"path", "error"} and line["path"].endswith(name)
        assert reason in line["error"]


@pytest.fixture
def changed(golden: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that writes the golden bundle with changes of its manifest."""

    def write(**changes: Any) -> Path:
        bundle = tmp_path / "changed.capt"
        shutil.copytree(golden, bundle)
        manifest = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        return bundle

    return write


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "schema version 2, this reader knows 1"),
        ({"novelty": 1}, "unknown key 'novelty'"),
        ({"class_names": ["a", "b", "c", "d"]}, "its manifest was changed"),
        ({"class_names": ["a"]}, "`tuned` flag"),
        ({"files": {}}, "does not list 'model.onnx'"),
        ({"graphs": {"bf16": {"file": "model.onnx", "opset": 20}}}, "no graph in"),
        ({"graphs": {"fp32": {"file": "../model.onnx", "opset": 20}}}, "leads out of the bundle"),
        ({"preprocess": {"size": [16, 16, 16]}}, "expected a size"),
    ],
)
def test_a_bundle_that_cannot_be_trusted_is_refused(
    program: Path, changed: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    done = run(program, changed(**changes), "photo.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and reason in done.stderr


def test_a_changed_graph_and_what_is_no_bundle_are_refused(
    program: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = changed()
    graph = bundle / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    for wrong, reason in (
        (bundle, "model.onnx is not the file that was exported"),
        (tmp_path / "nothing", "expected a bundle's folder"),
        (tmp_path, "no such file"),
    ):
        done = run(program, wrong, "photo.jpg")
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
    assert run(program).returncode == 2
    assert "usage: capt_classify BUNDLE PHOTO" in run(program, "--help").stderr
