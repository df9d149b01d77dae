"""A part's rows are those of `capt-predict --json`, wherever its photos lie."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from capt_deploy.bulk import parts, storage
from capt_deploy.bulk.labeller import Labeller, LabelOptions
from capt_deploy.bulk.results import Results
from capt_deploy.cli.predict import main
from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.core.errors import BundleError
from capt_deploy.serving.classifier import Classifier

pa = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
pq = pytest.importorskip("pyarrow.parquet")
LocalFileSystem = pytest.importorskip("pyarrow.fs").LocalFileSystem

Label = Callable[..., list[dict[str, Any]]]
OPTIONS = LabelOptions(backend="onnxruntime-cpu", top_k=3, batch_size=2)


@pytest.fixture
def label(golden: Path, tmp_path: Path) -> Label:
    """Return a function that labels all photos of some paths, without Ray."""

    def rows(*paths: str, bundle: Path = golden, options: LabelOptions = OPTIONS) -> list:
        labeller = Labeller(bundle, options, Results(str(tmp_path / "out")), threads=1)
        for part in parts.find_parts(paths):
            labeller.label(part)
        return pq.read_table(tmp_path / "out").to_pylist()

    return rows


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the form of --json, in which only errors have that key and no other."""
    if row["error"] is not None:
        return {"path": row["path"], "error": row["error"]}
    return {key: value for key, value in row.items() if key != "error"}


def test_rows_are_those_of_the_single_process(
    decided_bundle: Path, photos: Path, label: Label
) -> None:
    wanted = ["--top-k", "3", "--backend", "onnxruntime-cpu", "--coverage", "0.8"]
    wanted += ["--accuracy", "0.7", "--batch-size", "2"]
    done = CliRunner().invoke(main, [str(decided_bundle), str(photos), "--json", *wanted])
    decisions = DecisionOptions(coverage=0.8, accuracy=0.7)
    options = LabelOptions("onnxruntime-cpu", 3, decisions, batch_size=2)
    rows = label(str(photos), bundle=decided_bundle, options=options)
    assert [as_json(row) for row in rows] == json.loads(done.stdout)
    assert rows[0]["prediction_set"] and rows[0]["rejected"] is not None
    assert "no image of a format" in rows[2]["error"]


def test_a_store_gives_the_same_rows(
    photos: Path, label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = label(str(photos))
    monkeypatch.setattr(storage, "_open_store", lambda *_: (LocalFileSystem(), "/"))
    remote = label(f"s3://{photos}")
    prefix = f"s3://{photos}/"
    assert [row["path"].replace("s3://", "") for row in remote] == [row["path"] for row in local]
    for row, other in zip(remote, local, strict=True):
        assert row["path"].startswith(prefix)
        assert {**row, "path": "", "error": ""} == {**other, "path": "", "error": ""}
        assert (row["error"] is None) == (other["error"] is None)
    monkeypatch.setattr(storage, "_PAUSES", ())
    monkeypatch.setattr(storage, "_LARGEST_PHOTO", 50)
    table = photos.parent / "list.parquet"
    pq.write_table(pa.table({"path": [f"{prefix}a.png", f"{prefix}gone.png"]}), table)
    large, missing = label(str(table))[:2]
    assert "expected at most 1 GiB" in large["error"]
    assert missing["error"].endswith("gone.png: no such file")


@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_of_a_table_give_the_same_rows(
    photos: Path, label: Label, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_SMALLEST", 3)
    files = sorted(photos.iterdir())
    local = label(*map(str, files))
    table = photos.parent / "table.parquet"
    content = [file.read_bytes() for file in files] * 2
    paths = [*map(str, files), *[None] * len(files)]
    pq.write_table(pa.table({"bytes": content, "path": paths}), table, row_group_size=group)
    rows = label(str(table))
    assert [row["path"] for row in rows[:4]] == paths[:4]
    assert [row["path"] for row in rows[4:]] == [f"{table}, row {row}" for row in range(4, 8)]
    for row, other in zip(rows, local * 2, strict=True):
        assert (row["label"], row["top_k"]) == (other["label"], other["top_k"])
    assert [row["error"] is not None for row in rows] == [False, False, True, False] * 2


def test_a_missing_photo_in_a_table_is_its_rows_error(photos: Path, label: Label) -> None:
    table = photos.parent / "table.parquet"
    pq.write_table(pa.table({"bytes": [None, (photos / "a.png").read_bytes()]}), table)
    assert [row["error"] is None for row in label(str(table))] == [False, True]


def test_a_bundle_comes_as_bytes_where_its_path_is_not_in_reach(
    golden: Path, photos: Path, tmp_path: Path, label: Label
) -> None:
    expected = label(str(photos))
    content = {file.name: file.read_bytes() for file in golden.iterdir()}
    away = tmp_path / "away" / "tiny.capt"
    results = Results(str(tmp_path / "other"))
    (part,) = parts.find_parts([str(photos)])
    Labeller(away, OPTIONS, results, 1, content).label(part)
    assert pq.read_table(tmp_path / "other").to_pylist() == expected
    damaged = {**content, "model.onnx": content["model.onnx"][:-1]}
    with pytest.raises(BundleError, match="is not the file that was exported"):
        Labeller(away, OPTIONS, results, 1, damaged).label(part)


def test_each_bad_name_in_a_list_is_its_rows_error(photos: Path, label: Label) -> None:
    table = photos.parent / "list.parquet"
    os.mkfifo(photos / "pipe.png")
    bad = {
        "https://example.com/x.jpg": "expected a URI that begins with one of s3",
        "s3://key:secret@bucket/x.jpg": "expected no password",
        "s3:///x.jpg": "Missing bucket name",
        "file://server/x.jpg": "Unsupported hostname",
        "abfs://bad/x.jpg": "abfs://bad: cannot be opened",
        f"file://{photos}/pipe.png": "expected a regular file",
        f"file://{photos}/gone.png": "gone.png: no such file",
    }
    pq.write_table(pa.table({"path": [*bad, f"file://{photos}/a.png"]}), table)
    *rows, local = label(str(table))
    for row, reason in zip(rows, bad.values(), strict=True):
        assert reason in row["error"] and "secret" not in row["error"]
    assert local["error"] is None


def test_a_store_that_does_not_open_is_asked_again(
    photos: Path, label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([OSError("down"), OSError("down"), (LocalFileSystem(), "/")])

    def from_uri(uri: str) -> tuple[LocalFileSystem, str]:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=from_uri))
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    storage._open_store.cache_clear()
    try:
        assert storage.read_photo(f"s3://{photos}/a.png") == (photos / "a.png").read_bytes()
    finally:
        storage._open_store.cache_clear()


def test_the_classifier_is_not_loaded_by_threads_that_decode(
    photos: Path, label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, load = [], Classifier.load

    def record(*args: Any, **options: Any) -> Classifier:
        threads.append(threading.current_thread())
        return load(*args, **options)

    monkeypatch.setattr(Classifier, "load", record)
    label(str(photos))
    assert threads == [threading.main_thread()]
