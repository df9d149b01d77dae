"""Bundles: the same from a folder and a zip, and nothing that was changed is taken."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from capt_deploy.bundle.manifest import FileRecord, Graph, Manifest
from capt_deploy.bundle.read import MANIFEST, TEXT_EMBEDDINGS, Bundle, is_bundle, open_bundle
from capt_deploy.core.errors import BundleError
from capt_deploy.data.preprocess import PreprocessConfig

ROWS = {
    "text_embeddings": np.arange(6, dtype=np.float32).reshape(2, 3),
    "zero_shot": np.ones((2, 3), np.float32),
    "bias": np.zeros(2, np.float32),
}
FILES = {
    "model.onnx": bytes(range(256)) * 40,
    "half.onnx": b"half the bytes",
    TEXT_EMBEDDINGS: save(ROWS),
}


CALIBRATION = {"temperature": 1.0, "zero_shot_temperature": 1.0}


def record(data: bytes) -> FileRecord:
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def manifest() -> Manifest:
    return Manifest(
        class_names=("ape", "bee"),
        tuned=(True, False),
        preprocess=PreprocessConfig((4, 4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        graphs={"fp32": Graph("model.onnx", 20), "fp16": Graph("half.onnx", 20)},
        calibration=dict.fromkeys(("fp32", "fp16"), CALIBRATION),
        confusion_pairs=(),
        training={"seed": 1},
        files={name: record(data) for name, data in FILES.items()},
    )


def write_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(json.dumps({**manifest().to_dict(), **changes}, default=vars))
    return folder


def write_zip(folder: Path, target: Path, top: str) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets.capt")


FORMS = {
    "folder": lambda folder: folder,
    "zip": lambda folder: write_zip(folder, folder.with_suffix(".zip"), ""),
    "zip of the folder": lambda folder: write_zip(folder, folder.with_suffix(".zip"), "pets.capt/"),
    "zip named .capt": lambda folder: write_zip(folder, folder.with_name("x.capt"), "pets.capt/"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_manifest_and_files(folder: Path, form: str) -> None:
    path = FORMS[form](folder)
    assert is_bundle(path)
    bundle = open_bundle(str(path))
    assert bundle == Bundle(path, manifest())
    assert {name: bundle.read(name) for name in FILES} == FILES
    assert bundle.precisions == ("fp32", "fp16")
    read = bundle.text_embeddings()
    assert set(read) == set(ROWS)
    for name, rows in ROWS.items():
        np.testing.assert_array_equal(read[name], rows)


def test_a_precision_that_is_not_there_names_those_that_are(folder: Path) -> None:
    with pytest.raises(BundleError, match="no 'int8' graph; it holds fp32, fp16"):
        open_bundle(folder).graph("int8")


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    (folder / "extra.txt").write_text("x")
    with pytest.raises(BundleError, match=r"lists no 'extra\.txt', only half\.onnx, model\.onnx"):
        open_bundle(folder).read("extra.txt")


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: b"X" + d[1:], lambda d: b""])
def test_a_changed_file_is_refused(folder: Path, change: Callable[[bytes], bytes]) -> None:
    (folder / "model.onnx").write_bytes(change(FILES["model.onnx"]))
    with pytest.raises(BundleError, match=r"model\.onnx is not the file that was exported"):
        open_bundle(folder).read("model.onnx")


def test_a_pointer_of_git_lfs_is_to_be_fetched(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(BundleError, match=r"model\.onnx is not the file .*`git lfs pull`"):
        open_bundle(folder).read("model.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_file_is_named(folder: Path, form: str) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"(cannot read|holds no) model\.onnx"):
        open_bundle(FORMS[form](folder)).read("model.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_without_a_manifest_it_is_no_bundle(folder: Path, form: str) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"manifest\.json.*is it a bundle\?"):
        open_bundle(FORMS[form](folder))


def test_a_path_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(tmp_path / "gone.capt")
    with pytest.raises(BundleError, match="is it a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "text.zip").write_text("this is no zip")
    with pytest.raises(BundleError, match="is it a bundle"):
        open_bundle(tmp_path / "text.zip")
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "gone.zip")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "//etc/passwd", "a/../../b", "..\\b", "C:\\b", "", ".", "a\0b"],
)
@pytest.mark.parametrize("place", ["files", "graphs"])
def test_a_name_that_leads_out_of_the_bundle_is_refused(
    tmp_path: Path, name: str, place: str
) -> None:
    changes = {
        "files": {"files": {name: vars(record(b"secret"))}},
        "graphs": {"graphs": {"fp32": {"file": name, "opset": 20}}},
    }
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(BundleError, match="leads out of the bundle; do not trust it"):
        open_bundle(write_folder(tmp_path / "evil.capt", **changes[place]))


def test_another_version_is_refused_with_the_files_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "new.capt", schema_version=2)
    with pytest.raises(BundleError, match=r"new\.capt/manifest\.json: schema version 2"):
        open_bundle(folder)


def test_text_embeddings_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    files = {TEXT_EMBEDDINGS: vars(record(b"junk"))}
    folder = write_folder(tmp_path / "bad.capt", files=files)
    (folder / TEXT_EMBEDDINGS).write_bytes(b"junk")
    with pytest.raises(BundleError, match=r"text_embeddings\.safetensors is damaged"):
        open_bundle(folder).text_embeddings()


@settings(deadline=None, max_examples=150)
@given(
    keep=st.floats(0, 1) | st.just(1.0),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_zip_gives_the_exported_files_or_a_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, keep: float, changes: list[tuple[int, int]]
) -> None:
    place = tmp_path_factory.mktemp("zip")
    path = write_zip(write_folder(place / "pets.capt"), place / "pets.zip", "")
    data = bytearray(path.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data[: round(keep * len(data))])
    try:
        content = open_bundle(path).read("model.onnx")
    except BundleError as error:
        assert "pets.zip" in str(error)
    else:
        assert content == FILES["model.onnx"]
    shutil.rmtree(place)


def test_damage_inside_the_compressed_data_is_a_bundle_error(folder: Path) -> None:
    path = FORMS["zip"](folder)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model.onnx")
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len("model.onnx")
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"cannot read model\.onnx"):
        open_bundle(path).read("model.onnx")


posix_only = pytest.mark.skipif(os.name != "posix", reason="needs pipes and sparse files")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(20 << 30)


def other_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@posix_only
@pytest.mark.parametrize("put", [pipe, device, sparse, other_folder])
@pytest.mark.parametrize("name", ["model.onnx", MANIFEST, TEXT_EMBEDDINGS])
def test_kind_and_size_of_a_file_are_checked_before_it_is_read(
    folder: Path, put: Callable[[Path], None], name: str
) -> None:
    put(folder / name)
    with pytest.raises(BundleError, match=rf"pets\.capt: .*{name} .*\(expected .*came"):
        open_bundle(folder).read(name)


@posix_only
@pytest.mark.parametrize("put", [pipe, device, sparse])
@pytest.mark.parametrize("name", ["x.zip", "x.onnx", "x.capt"])
def test_kind_and_size_of_a_bundle_are_checked_before_it_is_read(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    (tmp_path / name).touch()
    put(tmp_path / name)
    with pytest.raises(BundleError, match=r"expected a regular file|at most|is it a bundle"):
        open_bundle(tmp_path / name)


@posix_only
@pytest.mark.parametrize("put", [pipe, device, sparse])
def test_kind_and_size_of_weights_are_checked_before_they_are_read(
    folder: Path, put: Callable[[Path], None]
) -> None:
    put(folder / "half.onnx")
    with pytest.raises(BundleError, match=r"half\.onnx"):
        open_bundle(folder).private_copy("half.onnx")


def test_large_files_are_read_once_into_a_private_copy(folder: Path) -> None:
    copied = open_bundle(folder).private_copy("half.onnx")
    place = Path(copied.name)
    (folder / "half.onnx").write_bytes(b"other content")
    assert [file.read_bytes() for file in place.iterdir()] == [FILES["half.onnx"]]
    if os.name == "posix":
        assert place.stat().st_mode & 0o777 == 0o700
    copied.cleanup()
    assert not place.exists()
    for content in (b"other content", FILES["half.onnx"][::-1]):
        (folder / "half.onnx").write_bytes(content)
        with pytest.raises(BundleError, match=r"half\.onnx was changed after the export"):
            open_bundle(folder).private_copy("half.onnx")


@posix_only
def test_a_copy_that_cannot_be_written_is_a_bundle_error(folder: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "gone" / "x", Path("/dev/full")):
        with pytest.raises(BundleError, match="cannot be copied"):
            open_bundle(folder).copy("half.onnx", target)


@posix_only
def test_a_declared_size_beyond_the_format_is_not_read(tmp_path: Path) -> None:
    files = {"model.onnx": {"sha256": "0" * 64, "bytes": 20 << 30}}
    folder = write_folder(tmp_path / "big.capt", files=files)
    sparse(folder / "model.onnx")
    with pytest.raises(BundleError, match="expected at most 2,147,483,647 bytes, came 21,4"):
        open_bundle(folder).read("model.onnx")


def test_a_member_of_a_zip_that_grows_is_not_unpacked(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pets.capt")
    (folder / "model.onnx").write_bytes(bytes(50_000_000))
    path = write_zip(folder, tmp_path / "pets.zip", "")
    with pytest.raises(BundleError, match=r"expected at most 10,240 bytes, came 50,000,000"):
        open_bundle(path).read("model.onnx")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_stored_and_deflated_members_are_unpacked(folder: Path, method: int) -> None:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", method) as archive:
        archive.write(folder / MANIFEST, MANIFEST)
    with pytest.raises(BundleError, match=r"manifest\.json \(expected it stored or deflated"):
        open_bundle(folder.with_suffix(".zip"))


@pytest.mark.parametrize("name", ["x" * 5000 + ".capt", "x" * 5000 + ".onnx", "a\0b.capt"])
def test_a_name_that_no_file_can_have_is_a_bundle_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"cannot be read|no such bundle"):
        open_bundle(tmp_path / name)


AWARE = {"fp32": {**CALIBRATION, "distance_aware": True}, "fp16": CALIBRATION}


def write_factors(folder: Path, **tensors: np.ndarray) -> Bundle:
    rows = save({**ROWS, **tensors})
    files = {**FILES, TEXT_EMBEDDINGS: rows}
    records = {name: record(data) for name, data in files.items()}
    bundle = write_folder(folder, calibration=AWARE, files=records)
    (bundle / TEXT_EMBEDDINGS).write_bytes(rows)
    return open_bundle(bundle)


def test_factors_are_there_where_a_graph_has_them(tmp_path: Path) -> None:
    bundle = write_factors(tmp_path / "a", factors=np.array([1, 0.9], np.float32))
    found = bundle.calibration_of("fp32")
    assert found.factors == (1.0, float(np.float32(0.9)))
    assert bundle.calibration_of("fp16").factors is None


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        *({"factors": np.array(own, np.float32)} for own in ([1.0], [1, 0], [1, np.nan], [[1, 1]])),
    ],
)
def test_factors_that_cannot_be_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="a factor above 0 for each of its classes"):
        write_factors(tmp_path / "a", **tensors).calibration_of("fp32")
