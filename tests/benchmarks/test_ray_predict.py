"""The docs show what was measured; that jobs are killed and continued is tested with the job."""

from pathlib import Path

from benchmarks import ray_predict, record


def test_the_docs_show_the_table_of_the_rows() -> None:
    cells = record.load_cells(ray_predict.NAME)
    assert ray_predict.markdown(cells) in ray_predict.DOCS.read_text()
    for cell in cells.values():
        assert cell["photos"] == 20_000 and len(cell["killed"]["parts_of_attempts"]) == 4
        for counts in (cell["ray"], cell["killed"]):
            assert (counts["missing"], counts["twice"], counts["different"]) == (0, 0, 0)


def test_rows_that_are_missing_twice_or_different_are_counted() -> None:
    expected = [{"path": name, "label": "cat"} for name in "abc"]
    rows = [expected[0], expected[0], {"path": "b", "error": "broken"}]
    counts = ray_predict.compare(rows, expected)
    assert counts == {"missing": 1, "twice": 1, "different": 2, "errors": 1}


def test_the_photos_come_from_the_seed(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        ray_predict.write_photos(folder, 2, seed)
    same, again, other = ([file.read_bytes() for file in sorted(f.iterdir())] for f in folders)
    assert same == again != other
