"""Damaged caches: an entry is missing or right, never another one and never an error."""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capt_deploy.backends.tensorrt.cache import EngineCache, EngineKey
from capt_train.data.embedding_cache import EmbeddingCache

KNOWN = {f"{number:064x}": np.full(8, number, np.float32) for number in range(40)}
KEY = EngineKey("tensorrt_rtx", "1.7", "linux-x86_64", 89, onnx="a" * 64, batches=(1, 8, 32))
ENGINE = bytes(range(256)) * 8
Damage = list[tuple[float, bytes]]
damages = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), max_size=4)


def damaged(content: bytes, damage: Damage, kept: float) -> bytes:
    """Return content that is written over in places, and cut where less than half is kept."""
    changed = bytearray(content)
    for place, written in damage:
        start = round(place * len(changed))
        changed[start : start + len(written)] = written
    return bytes(changed[: round(kept * len(changed))] if kept < 0.5 else changed)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with closing(EmbeddingCache("model", "cpu", folder)) as cache:
        cache.put(KNOWN)
    return folder


@settings(deadline=None)
@given(damage=damages, kept=st.floats(0, 1))
@example(damage=[(0.1944075897517808, b" \x80")], kept=1.0)  # sqlite3's own message is no text
def test_a_damaged_embedding_is_missing(
    stored: Path, tmp_path_factory: pytest.TempPathFactory, damage: Damage, kept: float
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("copy") / "cache"))
    (file,) = folder.glob("*.sqlite")
    file.write_bytes(damaged(file.read_bytes(), damage, kept))
    with closing(EmbeddingCache("model", "cpu", folder)) as cache:
        for key, embedding in cache.get(list(KNOWN)).items():
            np.testing.assert_array_equal(embedding, KNOWN[key])
        cache.put(KNOWN)
        found = cache.get(list(KNOWN))
    assert all(np.array_equal(found[key], KNOWN[key]) for key in found)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"))


@settings(deadline=None)
@given(damage=damages, kept=st.floats(0, 1))
def test_a_damaged_engine_is_built_again(engines: EngineCache, damage: Damage, kept: float) -> None:
    engines.write(KEY, ENGINE)
    path = engines.path_of(KEY)
    path.write_bytes(damaged(path.read_bytes(), damage, kept))
    assert engines.read(KEY) in (None, ENGINE)
    assert len(engines.entries()) == 1
    assert engines.obtain(KEY, lambda: ENGINE, lambda body: body) == ENGINE
