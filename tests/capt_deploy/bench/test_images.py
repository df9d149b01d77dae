import io

import pytest
from PIL import Image

from capt_deploy.bench.images import folder_photos, synthetic_photos
from capt_deploy.core.errors import DataError, ImageError


def test_synthetic_photos_are_jpegs_of_one_size_from_a_seed():
    photos = synthetic_photos(3)
    assert photos == synthetic_photos(3)
    assert photos.source == "synthetic 500x375"
    assert len({*photos.encoded, *synthetic_photos(3, seed=1).encoded}) == 6
    for photo in photos.encoded:
        image = Image.open(io.BytesIO(photo))
        image.load()
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 20_000 < len(photo) < 100_000  # as much to decode as in a real photo


def test_a_folders_photos_are_its_files_as_they_are(put_images):
    folder = put_images("b/2.png", "a.png", ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    photos = folder_photos(folder)
    assert photos.encoded == [(folder / n).read_bytes() for n in ("a.png", "b/2.png")]
    assert photos.source == f"2 of {folder}"


def test_a_folder_without_an_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image"):
        folder_photos(tmp_path)


def test_a_broken_photo_is_named(put_images):
    folder = put_images("a.png")
    (folder / "b.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"b\.jpg"):
        folder_photos(folder)
