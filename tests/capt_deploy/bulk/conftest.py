"""Photos for these tests."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three photos of one colour each, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a", (200, 50, 50)), ("b", (50, 160, 50)), ("d", (60, 110, 200))):
        Image.new("RGB", (20, 20), colour).save(folder / f"{name}.png")
    (folder / "c.jpg").write_text("no image")
    return folder
