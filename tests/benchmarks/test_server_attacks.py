"""The costly images are what they claim to be, and small."""

import io

from PIL import Image

from benchmarks.server_attacks import jpeg_of_scans, png_of_16_bits, table


def test_the_images_decode_and_are_small() -> None:
    for image, mode in ((jpeg_of_scans(300, 50), "L"), (png_of_16_bits(300), "I;16")):
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            assert (opened.size, opened.mode) == ((300, 300), mode)
        assert len(image) < 3000
    assert jpeg_of_scans(300, 50).count(b"\xff\xda") == 51


def test_the_table_has_a_line_for_each_row() -> None:
    assert table([{"a": 1, "b": 2}]) == "| a | b |\n|---|---|\n| 1 | 2 |"
