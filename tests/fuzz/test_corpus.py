"""Files that once broke something, kept as they were: images with pixels, images without, lists.

A file that fuzzing finds is added to its folder; nothing here needs to change for it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capt_deploy.core.errors import DataError, ImageError
from capt_deploy.data.datasets import read_dataset
from capt_deploy.data.preprocess import PreprocessConfig, preprocess

CORPUS = Path(__file__).with_name("corpus")
CONFIG = PreprocessConfig((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def files(folder: str) -> list[Path]:
    """Return the files of a folder of the corpus; there are some."""
    found = sorted((CORPUS / folder).iterdir())
    assert found
    return found


@pytest.mark.parametrize("file", files("images/readable"), ids=lambda file: file.name)
def test_images_that_are_odd_have_their_pixels(file: Path) -> None:
    pixels = preprocess(file, CONFIG)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert pixels.max() > pixels.min()


@pytest.mark.parametrize("file", files("images/unreadable"), ids=lambda file: file.name)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_images_that_cannot_be_read_are_named(file: Path, as_bytes: bool) -> None:
    with pytest.raises(ImageError) as caught:
        preprocess(file.read_bytes() if as_bytes else file, CONFIG)
    assert as_bytes or file.name in str(caught.value)


@pytest.mark.parametrize("file", files("lists"), ids=lambda file: file.name)
def test_lists_that_cannot_be_used_are_data_errors(file: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    shutil.copy(file, tmp_path)
    with pytest.raises(DataError):
        read_dataset(tmp_path / file.name)
