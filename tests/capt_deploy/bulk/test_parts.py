"""The same photos come into the same parts, from wherever people keep them."""

from pathlib import Path

import pytest

from capt_deploy.bulk import parts as module
from capt_deploy.bulk.parts import Part, find_parts, fingerprint
from capt_deploy.bulk.results import Results
from capt_deploy.core.errors import DataError
from capt_deploy.data import folders
from capt_deploy.serving.labelling import find_images

pa = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALLEST", 2)


def names(parts: list[Part]) -> list[str]:
    return [name for part in parts for name in part.names]


def write_table(file: Path, group: int = 1000, **columns: list) -> str:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return str(file)


@pytest.mark.usefixtures("small_parts")
def test_files_are_those_of_the_single_process_in_its_order(photos: Path) -> None:
    given = [str(photos / "d.png"), str(photos), str(photos / "*.png")]
    parts = find_parts(given, ["gone.png"])
    assert names(parts) == [*find_images(given), "gone.png"]
    assert [part.number for part in parts] == [0, 1, 2]
    assert [part.photos for part in parts] == [2, 2, 1]


def test_a_folder_in_a_store_is_searched_like_a_local_one(photos: Path) -> None:
    (photos / ".hidden.png").touch()
    (photos / "notes.txt").touch()
    found = names(find_parts([f"file://{photos}/"]))
    assert found == [f"file://{name}" for name in find_images([str(photos)])]
    assert names(find_parts([f"file://{photos}/a.png"])) == [f"file://{photos}/a.png"]


def test_tables_of_names_are_lists_of_files(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = [str(photos / "b.png"), f"file://{photos}/a.png", None, str(photos / "b.png")]
    table = write_table(tmp_path / "list.parquet", path=listed)
    assert names(find_parts([table])) == listed[:2]
    assert "left out 1 row without a path" in caplog.text


@pytest.mark.usefixtures("small_parts")
def test_tables_of_photos_are_divided_by_rows(tmp_path: Path) -> None:
    file = write_table(tmp_path / "tables" / "x.parquet", bytes=[b"x"] * 5)
    write_table(tmp_path / "tables" / "_hidden.parquet", bytes=[b"x"])
    capitals = write_table(tmp_path / "capitals" / "X.PARQUET", bytes=[b"x"])
    assert [part.table for part in find_parts([str(tmp_path / "capitals")])] == [capitals]
    for given in (file, str(tmp_path / "tables"), f"file://{tmp_path}/tables"):
        parts = find_parts([given])
        assert {part.table for part in parts} == {file if given[0] == "/" else f"file://{file}"}
        assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 4), (4, 5)]


def test_photos_in_a_folder_come_before_tables_beside_them(photos: Path) -> None:
    write_table(photos / "labels.parquet", label=["cat"])
    assert names(find_parts([str(photos)])) == find_images([str(photos)])
    assert len(names(find_parts([f"file://{photos}"]))) == 4


def test_a_folder_is_walked_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(photos / "labels.parquet", label=["cat"])
    walked: list[Path] = []
    find_files = folders.find_files

    def record(folder: Path) -> folders.Found:
        walked.append(folder)
        return find_files(folder)

    for place in (folders, module):
        monkeypatch.setattr(place, "find_files", record)
    find_parts([str(photos)])
    assert walked == [photos]


def test_the_number_of_parts_has_a_limit() -> None:
    parts = find_parts([], [f"{number}.jpg" for number in range(600_000)])
    assert len(parts) == 2000
    assert sum(part.photos for part in parts) == 600_000


def test_a_part_survives_the_way_to_its_worker(photos: Path) -> None:
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    for part in (Part(3, ("a.png", odd)), Part(4, (), odd, 2, 9)):
        (item,) = pa.Table.from_pylist([part.to_item()]).to_pylist()
        assert Part.from_item(item) == part


def test_the_fingerprint_changes_with_the_list() -> None:
    lists = (["a", "b"], ["b", "a"], ["a"], ["a", "b", "c"])
    assert len({fingerprint(find_parts([], names)) for names in lists}) == len(lists)
    assert fingerprint(find_parts([], ["a"])) == fingerprint(find_parts([], ["a"]))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone/", "no such file, folder, or pattern"),
        ("", "one of the paths is empty"),
        ("file:///gone/away", "no such file or folder"),
        ("https://example.com/x.jpg", "expected a URI that begins with one of s3,"),
        ("s3://key:secret@bucket/x", "expected no password in the URI"),
        ("text.parquet", "cannot be read"),
        ("other.parquet", "came label (string)"),
        ("wrong.parquet", "came bytes (string)"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.parquet").write_text("no table")
    write_table(Path("other.parquet"), label=["cat"])
    write_table(Path("wrong.parquet"), bytes=["text"])
    with pytest.raises(DataError) as raised:
        find_parts([path])
    assert said in str(raised.value)
    assert "secret" not in str(raised.value)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="found no image"):
        find_parts([], [""])


def test_results_in_a_folder_of_photos_are_no_input(photos: Path) -> None:
    results = Results(str(photos / "results"))
    results.begin({}, 1)
    results.write(0, [{"path": "gone.png", "error": "no such file"}])
    assert names(find_parts([str(photos)])) == find_images([str(photos)])
    for file in photos.glob("*.*"):
        file.unlink()
    with pytest.raises(DataError, match="found no image"):
        find_parts([str(photos)])
    # Given by name, they are a list: of what is to be tried again.
    assert names(find_parts([str(photos / "results")])) == ["gone.png"]
