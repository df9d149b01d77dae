from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray

from capt_train.data import embedding_cache
from capt_train.data.embedding_cache import EmbeddingCache

Floats = NDArray[np.float32]


def some(count: int, dim: int = 32) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    return {f"{i:064x}": random.normal(size=dim).astype(np.float32) for i in range(count)}


def filled(folder: Path, embeddings: dict[str, Floats]) -> Path:
    cache = EmbeddingCache("model", folder=folder)
    cache.put(embeddings)
    cache.close()
    (file,) = folder.glob("*.sqlite")
    return file


def test_what_was_put_comes_back_bit_by_bit_after_reopening(tmp_path: Path) -> None:
    embeddings = some(1200)  # more than one statement may ask for
    filled(tmp_path, embeddings)
    cache = EmbeddingCache("model", folder=tmp_path)
    found = cache.get([*embeddings, "unknown"])
    cache.close()
    assert found.keys() == embeddings.keys()
    assert all(np.array_equal(found[key], embeddings[key]) for key in embeddings)


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    embeddings = some(3)
    filled(tmp_path, embeddings)
    other = EmbeddingCache("other", folder=tmp_path)
    assert other.get(list(embeddings)) == {}
    other.close()


def test_a_file_belongs_to_one_model_device_pixels_version_and_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = some(3)
    first = filled(tmp_path, embeddings)
    assert re.fullmatch(r"embeddings-[0-9a-f]{32}\.sqlite", first.name)

    def files_after(found: int, *arguments: str) -> int:
        cache = EmbeddingCache(*arguments, folder=tmp_path)
        assert len(cache.get(list(embeddings))) == found
        cache.close()
        return len(list(tmp_path.iterdir()))

    assert files_after(3, "model") == 1
    assert files_after(3, "model", "cpu") == 1
    assert files_after(0, "model", "cuda") == 2
    assert files_after(0, "a/../name no file may have") == 3
    monkeypatch.setattr(embedding_cache, "_PIXELS_VERSION", 10**6)
    assert files_after(0, "model") == 4
    monkeypatch.undo()
    monkeypatch.setattr(PIL, "__version__", "0.0")
    assert files_after(0, "model") == 5


def test_two_open_caches_of_one_model_see_each_others_embeddings(tmp_path: Path) -> None:
    first, second = (
        EmbeddingCache("model", folder=tmp_path),
        EmbeddingCache("model", folder=tmp_path),
    )
    first.put(some(1))
    second.put(some(3))
    assert len(first.get(list(some(3)))) == 3
    first.close()
    second.close()


def test_a_file_that_is_no_database_is_put_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = filled(tmp_path, some(3))
    file.write_bytes(b"damaged" * 1000)
    filled(tmp_path, some(2))
    assert file.with_suffix(".damaged").read_bytes() == b"damaged" * 1000
    assert "is damaged" in capsys.readouterr().err
    reopened = EmbeddingCache("model", folder=tmp_path)
    assert len(reopened.get(list(some(3)))) == 2
    reopened.close()


def test_a_database_damaged_inside_is_put_aside_when_that_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings = some(2000)
    file = filled(tmp_path, embeddings)
    content = bytearray(file.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    file.write_bytes(content)
    cache = EmbeddingCache("model", folder=tmp_path)
    found = cache.get(list(embeddings))
    assert len(found) < 2000
    cache.put(embeddings)
    assert len(cache.get(list(embeddings))) == 2000
    cache.close()
    assert "is damaged" in capsys.readouterr().err
    assert file.with_suffix(".damaged").exists()


def test_flipped_bits_never_give_another_embedding(tmp_path: Path) -> None:
    embeddings = some(40)
    file = filled(tmp_path, embeddings)
    content = file.read_bytes()
    random = np.random.default_rng(0)
    lost = 0
    for place in random.integers(100, len(content), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        cache = EmbeddingCache("model", folder=tmp_path)
        for _ in range(2):
            found = cache.get(list(embeddings))
            assert all(np.array_equal(found[key], embeddings[key]) for key in found)
            lost += len(found) < len(embeddings)
            cache.put(embeddings)
        cache.close()
    assert lost


WRONG = {
    "another length": lambda data: data[:-1],
    "half of it": lambda data: data[: len(data) // 2],
    "no bytes": lambda _: b"",
    "a text": lambda _: "text",
    "a number": lambda _: 3,
    "another bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_row_that_does_not_fit_its_checksum_is_missing_until_it_is_put_again(
    tmp_path: Path, kind: str
) -> None:
    embeddings = some(2)
    file = filled(tmp_path, embeddings)
    first, second = embeddings
    database = sqlite3.connect(file)
    ((data,),) = database.execute("SELECT embedding FROM embeddings WHERE image = ?", [first])
    change = "UPDATE embeddings SET embedding = ? WHERE image = ?"
    with database:
        database.execute(change, [WRONG[kind](data), first])
    cache = EmbeddingCache("model", folder=tmp_path)
    assert list(cache.get([first, second])) == [second]
    cache.put({first: embeddings[first]})
    assert np.array_equal(cache.get([first])[first], embeddings[first])
    with database:
        database.execute(change, [data, second])  # another image's, whole
    assert list(cache.get([first, second])) == [first]
    cache.close()
    database.close()


def test_an_unwritable_folder_is_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    cache = EmbeddingCache("model", folder=tmp_path / "file" / "cache")
    assert "embedding without it" in capsys.readouterr().err
    cache.put(some(2))
    assert len(cache.get(list(some(2)))) == 2  # within this process
    cache.close()


def test_a_disk_that_is_full_costs_the_cache_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(sqlite3.Connection):
        def executemany(self, *_: object) -> sqlite3.Cursor:
            raise sqlite3.OperationalError("database or disk is full")

    cache = EmbeddingCache("model", folder=tmp_path)
    cache.close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=FullDisk, **k))
    cache = EmbeddingCache("model", folder=tmp_path)
    monkeypatch.undo()
    cache.put(some(2))
    assert "disk is full" in capsys.readouterr().err
    cache.close()
