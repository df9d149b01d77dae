"""Damaged caches: an entry is missing or right, never another one and never an error."""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capt_train.data.embedding_cache import EmbeddingCache

KNOWN = {f"{number:064x}": np.full(8, number, np.float32) for number in range(40)}
Damage = list[tuple[float, bytes]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with closing(EmbeddingCache("model", "cpu", folder)) as cache:
        cache.put(KNOWN)
    return folder


@settings(deadline=None)
@given(
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), max_size=4),
    kept=st.floats(0, 1),
)
@example(damage=[(0.1944075897517808, b" \x80")], kept=1.0)  # sqlite3's own message is no text
def test_a_damaged_embedding_is_missing(
    stored: Path, tmp_path_factory: pytest.TempPathFactory, damage: Damage, kept: float
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("copy") / "cache"))
    (file,) = folder.glob("*.sqlite")
    content = bytearray(file.read_bytes())
    for place, written in damage:
        start = round(place * len(content))
        content[start : start + len(written)] = written
    file.write_bytes(content[: round(kept * len(content))] if kept < 0.5 else content)
    with closing(EmbeddingCache("model", "cpu", folder)) as cache:
        for key, embedding in cache.get(list(KNOWN)).items():
            np.testing.assert_array_equal(embedding, KNOWN[key])
        cache.put(KNOWN)
        found = cache.get(list(KNOWN))
    assert all(np.array_equal(found[key], KNOWN[key]) for key in found)
    shutil.rmtree(folder)
