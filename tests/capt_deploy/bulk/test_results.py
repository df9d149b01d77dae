"""A folder of results belongs to one job, and says which of its parts are done."""

import subprocess
import sys
from pathlib import Path

import pytest

from capt_deploy.bulk.results import JOB, Results
from capt_deploy.core.errors import ConfigError, DataError

pytest.importorskip("pyarrow", reason="the extra ray is not installed")

ROWS = [{"path": "a.png", "label": "cat", "confidence": 0.5}, {"path": "b.png", "error": "broken"}]


@pytest.fixture(params=["{}", "file://{}"], ids=["local", "store"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path / "deep" / "out")


def test_parts_that_are_written_are_done(out: str) -> None:
    results = Results(out)
    assert results.begin({"top_k": 5}, 3) == set()
    results.write(1, ROWS)
    assert Results(out).begin({"top_k": 5}, 3) == {1}
    results.write(0, ROWS)
    results.write(2, ROWS[:1])
    assert results.count(3) == (5, 2)


def test_what_a_killed_process_left_is_removed(out: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    for name in (JOB, "part-00000.parquet"):
        (folder / f".{name}.0123abcd.tmp").write_bytes(b"half")
    results = Results(out)
    assert results.begin({}, 2) == set()
    assert names(folder) == [JOB]
    results.write(0, ROWS)
    assert names(folder) == [JOB, "part-00000.parquet"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".capt_predict.lock")


def run_python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)


def test_a_second_command_is_refused_until_the_first_has_ended_or_was_killed(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    code = f"from {Results.__module__} import Results; Results({str(out)!r}).begin({{}}, 1)"
    command = [sys.executable, "-c", f"{code}; print('begun', flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "begun\n"
        half = out / ".part-00000.parquet.0123abcd.tmp"
        half.touch()  # what the first command writes
        with pytest.raises(ConfigError, match="another command is writing to this folder"):
            Results(str(out)).begin({}, 1)
        assert half.exists()
        first.kill()
    results = Results(str(out))
    assert results.begin({}, 1) == set()
    assert not half.exists()
    assert b"ConfigError" in run_python(code).stderr
    results.write(0, ROWS)
    assert results.count(1) == (2, 1)
    results.end()
    assert run_python(code).returncode == 0


def test_another_job_is_refused_and_nothing_changed(out: str, tmp_path: Path) -> None:
    results = Results(out)
    results.begin({"bundle": "b"}, 1)  # as with a backend that then cannot run
    results.begin({"bundle": "a", "top_k": 5, "photos": 3}, 1)
    results.write(0, ROWS)
    before = (tmp_path / "deep" / "out" / JOB).read_bytes()
    with pytest.raises(ConfigError, match=r"changed: photos, top_k\).*choose another folder"):
        Results(out).begin({"bundle": "a", "top_k": 3, "photos": 4}, 1)
    assert (tmp_path / "deep" / "out" / JOB).read_bytes() == before


def test_a_folder_of_something_else_is_refused(out: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match=r"came one with holiday\.jpg"):
        Results(out).begin({}, 1)
    assert [*folder.iterdir()] == [folder / "holiday.jpg"]
    (folder / "holiday.jpg").rename(folder / "part-00000.parquet")
    (folder / JOB).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Results(out).begin({}, 1)


def test_a_file_in_the_place_of_the_folder_and_damaged_parts_are_named(
    out: str, tmp_path: Path
) -> None:
    results = Results(out)
    results.begin({}, 1)
    (tmp_path / "deep" / "out" / "part-00000.parquet").write_text("no table")
    with pytest.raises(DataError, match="part-00000"):
        results.count(1)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="file: cannot be read"):
        Results(str(file)).begin({}, 1)
