"""Batches: every file once and in order, and a broken one costs only itself."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capt_deploy.data.batches import preprocess_files
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

CONFIG = PreprocessConfig((6, 5), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, noise: Callable) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        Image.fromarray(noise(9, 8, seed=seed)).save(folder / f"{seed}.png")
    (folder / "text.jpg").write_text("no image")
    return folder


names = st.lists(st.sampled_from(["0.png", "1.png", "2.png", "3.png", "text.jpg", "gone.png"]))


@settings(deadline=None, max_examples=60)
@given(names, st.integers(1, 5))
def test_every_readable_file_has_its_own_row_and_every_other_an_error(
    folder: Path, names: list[str], batch_size: int
) -> None:
    files = [str(folder / name) for name in names]
    batches = list(preprocess_files(files, CONFIG, batch_size))
    assert [file for batch in batches for file in batch.files] == files
    assert all(len(batch.files) == batch_size for batch in batches[:-1])
    for batch in batches:
        broken = [
            file for file in batch.files if not file.endswith(("0.png", "1.png", "2.png", "3.png"))
        ]
        readable = [file for file in batch.files if file not in broken]
        assert set(batch.errors) == set(broken)
        assert all(file in message for file, message in batch.errors.items())
        if readable:
            expected = np.stack([preprocess(file, CONFIG) for file in readable])
            np.testing.assert_array_equal(batch.pixels, expected)
        else:
            assert batch.pixels is None


def test_one_batch_is_read_ahead_and_no_more(folder: Path) -> None:
    late = folder / "late.png"
    files = [str(folder / "0.png"), str(folder / "1.png"), str(late)]
    batches = preprocess_files(files, CONFIG, 1)
    assert next(batches).errors == {}
    late.hardlink_to(folder / "2.png")
    assert next(batches).errors == {}
    third = next(batches)
    late.unlink()
    assert third.errors == {}
    np.testing.assert_array_equal(third.pixels[0], preprocess(folder / "2.png", CONFIG))


def test_no_files_give_no_batch() -> None:
    assert list(itertools.islice(preprocess_files([], CONFIG, 4), 1)) == []
