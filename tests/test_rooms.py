"""A newcomer finds her room: few modules a folder, imports one way, every room on the map."""

from pathlib import Path

import pytest

from tests.rooms import PACKAGES, read_packages

ROOT = Path(__file__).parents[1]
MOST_MODULES = 14
ONE_FILE_EACH = {"capt_train/published"}  # methods, of which there may be any number


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_is_crowded_and_no_rooms_import_each_other(package: str) -> None:
    rooms = read_packages(ROOT)[package]
    crowded = {folder: count for folder, count in rooms.modules.items() if count > MOST_MODULES}
    assert {*crowded} <= ONE_FILE_EACH
    assert rooms.circles() == []


def test_circles_are_found(tmp_path: Path) -> None:
    for file, source in {
        "export/a/x.py": "from export.b import y",
        "export/b/y.py": "import export.c.z",
        "export/c/z.py": "def late():\n    from export.a.x import name",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(source)
    rooms = read_packages(tmp_path)["export"]
    assert rooms.circles() == [("a", "b"), ("a", "c"), ("b", "c")]


def test_the_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in PACKAGES:
        for init in (ROOT / package).glob("*/__init__.py"):
            assert f"`{init.parent.name}/`" in text, init.parent
