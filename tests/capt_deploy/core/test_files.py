"""Files are whole or not there at all, also when the disk or the process gives up."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capt_deploy.core.errors import BundleError, ConfigError, DataError
from capt_deploy.core.files import (
    cache_folder,
    expand_home,
    is_inside,
    is_lfs_pointer,
    new_folder,
    new_zip,
    open_file,
    parse_json,
    read_json,
    sha256_file,
    write_bytes,
    write_json,
)

ROOT = Path(__file__).resolve().parents[3]
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits and signals")


def test_bytes_are_written_and_replaced_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.bin"
    for content in (b"old", b"", b"newer than old"):
        write_bytes(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


@posix_only
def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from capt_deploy.core.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except OSError as error: print('failed midway:', error)\n"
    )
    command = [sys.executable, "-B", "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("failed midway:")
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([number]) * 300_000 for number in (1, 2)]
    write_bytes(path, contents[0])
    finished = threading.Event()
    seen = []

    def read() -> None:
        while not finished.is_set():
            seen.append(path.read_bytes() in contents)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        write_bytes(path, contents[number % 2])
    finished.set()
    reader.join()
    assert seen
    assert all(seen)


def test_json_is_readable_text_and_comes_back(tmp_path: Path) -> None:
    value = {"name": "käse ✓", "values": [1, 2.5, None, True], "nested": {"a": []}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", DataError) == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "käse ✓" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", "old")
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"value": value})
    assert read_json(tmp_path / "a.json", DataError) == "old"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", None])
@pytest.mark.parametrize("error", [DataError, BundleError])
def test_unreadable_json_raises_the_callers_error(
    tmp_path: Path, content: bytes | None, error: type[Exception]
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(error, match=r"a\.json: expected a readable JSON file"):
        read_json(tmp_path / "a.json", error)


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_json(tmp_path / "a.json", DataError) == {"a": "ä"}


def test_what_fits_into_64_bits_and_100_levels_is_read() -> None:
    text = f"[{-(2**63)}, {2**64 - 1}, 1e308, {'[' * 99}3{']' * 99}]"
    assert json.dumps(parse_json(text, "here", DataError)) == text.replace("1e308", "1e+308")


UNUSABLE = {
    "an integer of 5000 digits": ("9" * 5000, "number 9{20}… of 5000 characters"),
    "an integer of 65 bits": (str(2**64), str(2**64)),
    "a negative one": (str(-(2**63) - 1), str(-(2**63) - 1)),
    "too large for a float": ("1e999", "1e999"),
    "infinity": ("Infinity", "Infinity"),
    "minus infinity": ("-Infinity", "-Infinity"),
    "NaN": ("NaN", "NaN"),
    "101 levels": ("[" * 101 + "]" * 101, "more than 100 deep"),
    "101 objects": ('{"a":' * 100 + "{}" + "}" * 100, "more than 100 deep"),
    "too deep for Python": ("[" * 200_000, "more than 100 deep"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_json_that_cannot_be_used_raises_the_readers_error(tmp_path: Path, kind: str) -> None:
    text, reason = UNUSABLE[kind]
    for content in (text, f'{{"a": [{text}]}}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(BundleError, match=rf"a\.json: expected a readable JSON .*{reason}"):
            read_json(tmp_path / "a.json", BundleError)
        for form in (content, content.encode()):
            with pytest.raises(DataError, match=f"line 3: not JSON .*{reason}") as caught:
                parse_json(form, "line 3", DataError)
            assert len(str(caught.value)) < 200


def test_json_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)  # without content on the disk
    with pytest.raises(DataError, match="at most 268,435,456 bytes, came 1,099,511,627,776"):
        read_json(tmp_path / "a.json", DataError)


@posix_only
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "whole").write_bytes(b"whole")
    (tmp_path / "good").symlink_to(tmp_path / "whole")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match=r"expected a regular file, came [pcd]"):
            open_file(path)
        with pytest.raises(DataError, match="expected a regular file"):
            read_json(path, DataError)
    with open_file(tmp_path / "good") as file:
        assert file.read() == b"whole"


def test_a_new_folder_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing_behind(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error, match="midway"), new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("a")
        raise error("midway")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_folder_but_other_errors_keep_their_words(tmp_path: Path) -> None:
    named = pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run'")
    with named, new_folder(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (
        OSError(errno.ENOSPC, "full", "other"),
        ConnectionError(errno.ECONNRESET, "gone"),
    ):
        said = str(error)
        with pytest.raises(OSError) as caught, new_folder(tmp_path / "run"):
            raise error
        assert str(caught.value) == said


def test_a_git_lfs_pointer_is_known_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "text").write_text("version 2")
    assert is_lfs_pointer(tmp_path / "pointer")
    assert not any(is_lfs_pointer(tmp_path / name) for name in ("text", "missing", ""))


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="run already exists"), new_folder(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="run"), new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "a.txt").write_text("theirs")
    assert (tmp_path / "run" / "a.txt").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_new_zip_appears_only_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run.zip"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_zip(target) as folder:
            (folder / "a.txt").write_text("a")
            raise error
        assert list(target.parent.iterdir()) == []
    with new_zip(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    with zipfile.ZipFile(target) as archive:
        assert [(info.filename, archive.read(info)) for info in archive.infolist()] == [
            ("a.txt", b"a")
        ]
    before = target.read_bytes()
    with pytest.raises(FileExistsError), new_zip(target):
        pass
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == before


WRITER = """
import sys, time; from pathlib import Path
from capt_deploy.core.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@posix_only
def test_what_a_killed_process_left_is_removed_but_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "run"
    command = [sys.executable, "-B", "-c", WRITER]
    started = []
    for place in (target, target, tmp_path / "other"):
        arguments = [*command, str(place)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        started.append(process)
    killed, alive, other = started
    for process in (killed, other):
        process.kill()
        process.communicate()
    (tmp_path / ".run.0123abcd.tmp").mkdir()  # not made here: without a lock
    (tmp_path / ".run.my notes.tmp").mkdir()
    (tmp_path / ".run.89abcdef.tmp").symlink_to(tmp_path / ".run.my notes.tmp")
    before = {path.name for path in tmp_path.iterdir()}
    try:
        with new_folder(target) as folder:
            (folder / "a.txt").write_text("a")
        after = {path.name for path in tmp_path.iterdir()}
    finally:
        alive.kill()
        alive.communicate()
    assert len(before - after) == 1 and len(before) == 6
    assert after - before == {"run"}
    with new_folder(tmp_path / "other"):
        pass
    assert not list(tmp_path.glob(".other.*"))


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "a.bin").write_bytes(data)
    assert sha256_file(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()


def test_home_is_expanded_and_an_unknown_user_left_alone() -> None:
    assert expand_home("~/a.jpg") == Path.home() / "a.jpg"
    assert expand_home(Path("a/~")) == Path("a/~")
    assert expand_home("~no_such_user_here.jpg") == Path("~no_such_user_here.jpg")


@pytest.mark.parametrize("name", ["a", "a/b.jpg", "a..b", "...", ".hidden/x", "10:30.jpg", "ä ö"])
def test_names_that_stay_inside(name: str) -> None:
    assert is_inside(name)


OUTSIDE = [
    "",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/..",
    "/a",
    "//a",
    "\\\\server\\a",
    "\\a",
    "C:\\a",
    "c:a",
    "..\\a",
    "a\\..\\b",
    "a\0",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(name: str) -> None:
    assert not is_inside(name)


@given(st.text(st.sampled_from("ab./\\:~\0"), max_size=12))
def test_whatever_is_called_inside_resolves_below_its_folder(name: str) -> None:
    root = Path("/srv/bundle")
    if is_inside(name):
        joined = os.path.normpath(root / name)
        assert joined.startswith(f"{root}{os.sep}")


def test_the_folder_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CAPT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CAPT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "capt"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "capt"


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of temporary files of a user without a home."""

    def fail() -> Path:
        raise RuntimeError("could not determine home directory")

    for name in ("CAPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="users have temporary files of their own here")
def test_a_user_without_a_home_has_a_cache_of_their_own_among_temporary_files(
    no_home: Path,
) -> None:
    for _ in range(2):
        folder = cache_folder()
        assert folder == no_home / f"capt-{os.geteuid()}"
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name != "posix", reason="users have temporary files of their own here")
@pytest.mark.parametrize("planted", ["open", "link", "file", "foreign"])
def test_a_temporary_cache_that_others_can_write_to_is_refused(
    no_home: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = no_home / f"capt-{os.geteuid()}"
    if planted == "link":
        (no_home / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(no_home / "elsewhere")
    elif planted == "file":
        folder.touch(0o600)
    else:
        folder.mkdir(mode=0o700)
    if planted == "open":
        folder.chmod(0o770)
    if planted == "foreign":  # the same folder, seen by somebody else
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        folder.rename(no_home / f"capt-{me + 1}")
    with pytest.raises(
        ConfigError, match=r"folder that only this user can access, came .*set \$CAPT_CACHE"
    ):
        cache_folder()
