"""Class names and file names that are out of the ordinary."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.data.class_names import distinct_names
from capt_deploy.data.datasets import read_dataset


def test_names_of_absent_classes_are_an_error_only_where_asked_for(
    put_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = put_images("data/ape/1.png", "data/bee/1.png") / "data"
    names = tmp_path / "names.json"
    names.write_text('{"ape": "great ape", "whale": "blue whale"}')
    with pytest.raises(DataError, match="'whale' is no class"):
        read_dataset(root, names)
    known = ("great ape", "bee", "blue whale")
    aligned = read_dataset(root, names, known)
    assert {known[item.label] for items in aligned.splits.values() for item in items} == {
        "great ape",
        "bee",
    }


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file names that are no text")
def test_a_file_name_that_is_no_text_is_skipped_and_listed(
    put_images: Callable[..., Path],
) -> None:
    root = put_images("ape/1.png", "bee/1.png")
    image = (root / "ape" / "1.png").read_bytes()
    Path(os.fsdecode(os.fsencode(root / "ape") + b"/k\xe4se.png")).write_bytes(image)
    dataset = read_dataset(root)
    assert sum(len(items) for items in dataset.splits.values()) == 2
    (left_out,) = dataset.skipped
    assert (left_out.path, left_out.reason) == ("ape/k\\udce4se.png", "its name is not valid UTF-8")


def test_a_list_of_names_keeps_its_order_and_spelling() -> None:
    names = distinct_names([" Red_Ball", "café  au lait"], ["red bull"])
    assert names == ("Red_Ball", "café au lait")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ape", "bee", "ape"], "'ape' is there already, as 'ape'"),
        (["bee", "Great_Ape"], "'Great_Ape' is there already, as 'great ape'"),
        (["ape", "\t"], "place 2 is empty"),
        ("ape", "expected a list of texts, came 'ape'"),
        (["ape", 7], "expected a list of texts"),
    ],
)
def test_names_that_would_be_mixed_up_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distinct_names(names, ["great ape"])
