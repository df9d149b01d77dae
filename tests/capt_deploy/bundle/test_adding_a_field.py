"""The worked example "add a bundle field": one field of a dataclass, and nothing else."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from capt_deploy.bundle.manifest import Manifest
from capt_deploy.core.errors import BundleError

GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass(frozen=True)
class Author:
    name: str
    year: int = 2026


@dataclass(frozen=True)
class NotedManifest(Manifest):
    notes: str | None = None
    authors: tuple[Author, ...] = ()


def golden(name: str = "tiny.capt") -> dict:
    return json.loads((GOLDEN / name / "manifest.json").read_text())


def test_a_new_field_is_read_and_written() -> None:
    values = {**golden(), "notes": "for the lab", "authors": [{"name": "Ada"}]}
    manifest = NotedManifest.from_dict(values, "here")
    assert manifest.notes == "for the lab"
    assert manifest.authors == (Author("Ada", 2026),)
    again = NotedManifest.from_json(json.dumps(manifest.to_dict()), "here")
    assert again == manifest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"notes": 5}, "here, notes: expected str, came 5"),
        ({"authors": "Ada"}, "here, authors: expected a list, came 'Ada'"),
        ({"authors": [{}]}, "here, authors: missing keys ['name']"),
        (
            {"authors": [{"name": "Ada", "year": "x"}]},
            "here, authors, year: expected int",
        ),
        ({"note": "x"}, "here: unknown keys ['note']; upgrade capt to read it"),
    ],
)
def test_its_type_is_checked_and_unknown_keys_are_still_refused(values: dict, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        NotedManifest.from_dict({**golden(), **values}, "here")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["tiny.capt", "open.capt"])
def test_bundles_without_the_field_still_load(name: str) -> None:
    manifest = NotedManifest.from_dict(golden(name), "here")
    assert (manifest.notes, manifest.authors) == (None, ())


def test_readers_that_do_not_know_the_field_say_what_to_do() -> None:
    with pytest.raises(BundleError, match=r"unknown keys \['notes'\]; upgrade"):
        Manifest.from_dict({**golden(), "notes": "x"}, "here")
