"""Every way to damage an entry ends in the right engine. The engine is a real one where
TensorRT-RTX is installed; building it anew is tested for real in test_build.py."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest

from capt_deploy.backends.tensorrt.cache import LIMIT, EngineCache, EngineKey, encode, read_key
from capt_deploy.core.errors import BackendError, ConfigError

KEY = EngineKey(
    *("tensorrt_rtx", "1.7.1.116", "linux-x86_64", 89),
    onnx="a" * 64,
    precision="fp16",
    batches=(1, 8, 32),
)


@pytest.fixture(scope="module")
def engine(golden):
    """Return an engine of the committed bundle, or something like one."""
    if find_spec("tensorrt_rtx") is None:
        return bytes(range(256)) * 4000
    from capt_deploy.backends.tensorrt.engine import build_engine

    return build_engine((golden / "model.onnx").read_bytes(), sm=89)


class Builder:
    """Counts how often it builds."""

    def __init__(self, engine):
        self.engine, self.built = engine, 0

    def __call__(self):
        self.built += 1
        return self.engine


@pytest.fixture
def builder(engine):
    return Builder(engine)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def get(cache, build, key=KEY):
    return cache.obtain(key, build, lambda body: body)


def truncate(part):
    def damage(path, data):
        path.write_bytes(data[: part(data)])

    return damage


def body_of(data):
    return data.index(b"\n") + 1


def flip(place, bit=0):
    def damage(path, data):
        changed = bytearray(data)
        changed[place(data)] ^= 1 << bit
        path.write_bytes(changed)

    return damage


def with_header(**changes):
    """Change what the header says; an inner dictionary is merged."""

    def damage(path, data):
        end = body_of(data)
        header = json.loads(data[:end])
        for name, value in changes.items():
            header[name] = {**header[name], **value} if isinstance(value, dict) else value
        text = json.dumps(header).encode()
        path.write_bytes(text + b"\n" + data[end:])

    return damage


def with_size_of_another_type(path, data):
    size = len(data) - body_of(data)
    with_header(bytes=str(size))(path, data)


def another(**changes):
    """Put there a whole entry that is for something else."""

    def damage(path, data):
        path.write_bytes(encode(replace(KEY, **changes), data[body_of(data) :]))

    return damage


def replaced_by(make):
    def damage(path, data):
        path.unlink()
        make(path)

    return damage


def pipe_in_its_place(path):
    os.mkfifo(path)


def headless(text):
    return lambda path, data: path.write_bytes(text)


DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "cut off in the header": truncate(lambda data: 100),
    "cut off behind the header": truncate(body_of),
    "cut off in the middle": truncate(lambda data: len(data) // 2),
    "the last byte missing": truncate(lambda data: -1),
    "one byte more": lambda path, data: path.write_bytes(data + b"\0"),
    "brace of the header flipped": flip(lambda data: 0),
    "end of the header flipped": flip(lambda data: body_of(data) - 1),
    "digit of the SM flipped": flip(lambda data: data.index(b'"sm": 89') + 6),
    "digit of the hash flipped": flip(lambda data: data.index(b'"sha256": "') + 11),
    "first byte of the body flipped": flip(body_of),
    "bit in the middle flipped": flip(lambda data: len(data) // 2, 7),
    "last byte flipped": flip(lambda data: -1, 4),
    "half of it zeros": lambda path, data: path.write_bytes(data[:4000].ljust(len(data), b"\0")),
    "another version inside": another(version="1.6.0.0"),
    "another SM inside": another(sm=75),
    "another GPU inside": another(gpu="NVIDIA H100 80GB HBM3"),
    "another driver inside": another(driver="535.1"),
    "another graph inside": another(onnx="b" * 64),
    "other weights inside": another(weights="c" * 64),
    "other batches inside": another(batches=(1, 1, 1)),
    "timings in its place": another(kind="timing"),
    "another format": with_header(format=1),
    "header with another size": with_header(bytes=10),
    "header with a size that is no whole number": with_size_of_another_type,
    "header with another hash": with_header(sha256="0" * 64),
    "header without a key": with_header(key=None),
    "header with more in the key": with_header(key={"more": 1}),
    "header is a list": headless(b"[1, 2]"),
    "header nested too deeply": headless(b"[" * 60000),
    "header is no UTF-8": headless(b"\xff\xfe{}"),
    "text of somebody else": lambda path, data: path.write_text("not an engine\n"),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path)),
    "a link to nowhere": replaced_by(lambda path: path.symlink_to(path.with_name("nowhere"))),
    "a pipe": replaced_by(pipe_in_its_place),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_built_again_once(name, cache, builder, engine):
    assert get(cache, builder) == engine
    path = cache.path_of(KEY)
    DAMAGES[name](path, path.read_bytes())
    assert get(cache, builder) == engine
    assert builder.built == 2
    assert get(cache, builder) == engine  # and the cache is whole again
    assert builder.built == 2
    assert read_key(path) == KEY.to_json()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_entry_is_built_again(cache, builder, engine):
    get(cache, builder)
    cache.path_of(KEY).chmod(0)
    assert get(cache, builder) == engine
    assert get(cache, builder) == engine
    assert builder.built == 2


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such owner here")
def test_an_entry_of_another_user_is_not_trusted(cache, builder, engine, monkeypatch, capsys):
    get(cache, builder)
    owner = cache.path_of(KEY).stat().st_uid
    with monkeypatch.context() as patch:
        status = os.fstat

        def foreign(descriptor):
            return os.stat_result((*status(descriptor)[:4], 4321, *status(descriptor)[5:10]))

        patch.setattr(os, "fstat", foreign)
        patch.setattr(os, "geteuid", lambda: 4320)
        assert cache.read(KEY) is None
        assert "belongs to another user" in capsys.readouterr().err
        patch.setattr(os, "geteuid", lambda: 4321)
        assert cache.read(KEY) == engine
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert cache.read(KEY) == engine
    assert cache.entries()[0].key == KEY.to_json()  # it is not damaged, and others may need it


def test_an_entry_is_built_once_and_read_then(cache, builder, engine):
    assert [get(cache, builder) == engine for _ in range(3)] == [True] * 3
    assert get(EngineCache(cache.folder), builder) == engine
    assert builder.built == 1


@pytest.mark.parametrize(
    "changes",
    [{"version": "2"}, {"sm": 86}, {"onnx": "b"}, {"batches": (1, 1, 1)}, {"driver": "9"}],
)
def test_what_differs_has_an_entry_of_its_own(changes, cache, builder):
    get(cache, builder)
    get(cache, builder, replace(KEY, **changes))
    assert builder.built == 2
    assert len(cache.entries()) == 2


def test_what_the_library_does_not_load_is_built_again(cache, builder, engine):
    loads = iter([None, None, "loaded"])  # before the lock, under the lock, the new one
    cache.write(KEY, b"an engine that only seems to be one")
    assert cache.obtain(KEY, builder, lambda body: next(loads)) == "loaded"
    assert cache.read(KEY) == engine


def test_what_was_just_built_and_does_not_load_is_an_error_and_not_kept(cache, builder):
    with pytest.raises(BackendError, match="just built does not load"):
        cache.obtain(KEY, builder, lambda body: None)
    assert cache.read(KEY) is None


def test_a_failed_build_is_passed_on_and_nothing_is_kept(cache, builder, engine):
    def fail():
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        get(cache, fail)
    assert cache.entries() == []
    assert get(cache, builder) == engine


def test_threads_at_once_build_once(cache, engine):
    built, got = [], []

    def build():
        built.append(1)
        time.sleep(0.2)
        return engine

    threads = [
        threading.Thread(target=lambda: got.append(get(cache, build) == engine)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), got) == (1, [True] * 6)


SLOW = f"""
import sys, time
from pathlib import Path
from capt_deploy.backends.tensorrt.cache import EngineCache, EngineKey
from capt_deploy.core.console import messages_on_stderr
KEY = {KEY}
shown = messages_on_stderr()
shown.__enter__()
log = Path(sys.argv[2])
def build():
    with log.open("a") as file:
        file.write("built\\n")
    print("building", flush=True)
    time.sleep(float(sys.argv[3]))
    return b"slowly built"
print(EngineCache(Path(sys.argv[1])).obtain(KEY, build, lambda body: body), flush=True)
"""


def build_slowly(cache, log, seconds):
    arguments = [sys.executable, "-c", SLOW, cache.folder, log, str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_at_once_build_once(cache, tmp_path):
    log = tmp_path / "log"
    processes = [build_slowly(cache, log, 1) for _ in range(3)]
    said = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert said == [b"b'slowly built'"] * 3
    assert log.read_text() == "built\n"


def test_a_killed_build_leaves_nothing_that_is_used_or_blocks(cache, tmp_path, builder, engine):
    process = build_slowly(cache, tmp_path / "log", 60)
    assert process.stdout.readline() == b"building\n"
    process.kill()
    process.communicate()
    start = time.monotonic()
    assert get(cache, builder) == engine
    assert time.monotonic() - start < 30  # it did not wait for the dead
    assert builder.built == 1


def test_who_waits_for_a_build_that_is_killed_builds_by_itself(cache, tmp_path):
    log = tmp_path / "log"
    first = build_slowly(cache, log, 60)
    assert first.stdout.readline() == b"building\n"
    second = build_slowly(cache, log, 0)
    assert b"another process builds this engine" in second.stderr.readline()
    first.kill()
    first.communicate()
    assert second.communicate()[0].splitlines()[-1] == b"b'slowly built'"
    assert log.read_text() == "built\n" * 2


def test_half_an_entry_of_a_killed_process_is_cleared_away(cache, builder, engine):
    cache.folder.mkdir()
    half = cache.path_of(KEY).with_name(f".{cache.path_of(KEY).name}.0123abcd.tmp")
    half.write_bytes(encode(KEY, engine)[:1000])
    stale = cache.folder / f"engine-{'0' * 32}.lock"
    stale.touch()
    cache.prune()
    assert list(cache.folder.iterdir()) == []
    half.write_bytes(b"again")
    assert get(cache, builder) == engine  # beside it
    cache.prune()
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".entry", ".lock"]


FULL = f"""
import resource, sys
from pathlib import Path
from capt_deploy.backends.tensorrt.cache import EngineCache, EngineKey
from capt_deploy.core.console import messages_on_stderr
KEY = {KEY}
shown = messages_on_stderr()
shown.__enter__()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(len(EngineCache(Path(sys.argv[1])).obtain(KEY, lambda: bytes(100_000), lambda body: body)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_costs_only_time(cache, builder, engine):
    arguments = [sys.executable, "-c", FULL, cache.folder]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == "100000\n"
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.suffix for path in cache.folder.iterdir()] == [".lock"]
    assert get(cache, builder) == engine


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path, builder, engine, capsys):
    (tmp_path / "file").touch()
    cache = EngineCache(tmp_path / "file" / "engines")
    assert get(cache, builder) == engine
    assert "building without it" in capsys.readouterr().err
    assert cache.entries() == []
    assert cache.prune() == []


def test_the_least_recently_used_are_pruned_but_never_the_newest(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)
    keys = [replace(KEY, sm=sm) for sm in range(5)]
    for sm, key in enumerate(keys):
        cache.write(key, bytes(1000))
        os.utime(cache.path_of(key), (sm, sm))
    cache.write(KEY, bytes(1000))  # the newest
    cache.read(keys[0])  # used again
    monkeypatch.setenv(LIMIT, str(3.5e-9 * cache.path_of(KEY).stat().st_size))
    cache = EngineCache(tmp_path)
    assert len(cache.prune()) == 3
    assert {entry.key["sm"] for entry in cache.entries()} == {0, 4, KEY.sm}
    monkeypatch.setenv(LIMIT, "0")
    EngineCache(tmp_path).write(replace(KEY, sm=9), bytes(1000))
    assert [entry.key["sm"] for entry in cache.entries()] == [9]


def test_damaged_entries_are_listed_and_pruned(cache, builder):
    get(cache, builder)
    other = replace(KEY, sm=75)
    get(cache, builder, other)
    cache.path_of(other).write_bytes(b"nothing")
    assert [entry.key is None for entry in cache.entries()].count(True) == 1
    assert [entry.bytes for entry in cache.prune()] == [7]
    assert [entry.key["sm"] for entry in cache.entries()] == [89]


def test_a_folder_in_place_of_an_entry_costs_only_time(cache, builder, engine):
    folder = cache.path_of(KEY)
    folder.mkdir(parents=True)
    (folder / "file").write_text("mine")
    assert get(cache, builder) == engine
    assert cache.entries() == []
    assert (folder / "file").read_text() == "mine"


def test_files_of_others_are_never_pruned(cache, builder, monkeypatch):
    get(cache, builder)
    foreign = ["notes.txt", ".hidden.tmp", "poetry.lock", "notes.entry", "engine-1.lock"]
    foreign += [f".{cache.path_of(KEY).name}.old", "engine-mine.entry", ".notes.entry.1234.tmp"]
    for name in foreign:
        (cache.folder / name).write_text("mine")
    (cache.folder / "diary.entry").mkdir()
    (cache.folder / "diary.entry" / "page").write_text("mine")
    shutil.copy(cache.path_of(KEY), cache.folder / "copy.bin")
    monkeypatch.setenv(LIMIT, "0")
    EngineCache(cache.folder).prune()
    kept = {path.name for path in cache.folder.iterdir()}
    assert kept == {*foreign, "diary.entry", "copy.bin"}
    assert (cache.folder / "diary.entry" / "page").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows asks for rights to make links")
def test_links_and_folders_with_its_own_names_are_not_pruned(cache, tmp_path, builder, monkeypatch):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    name, other = cache.path_of(KEY).stem, cache.path_of(replace(KEY, sm=75)).stem
    cache.folder.mkdir()
    kept = [f"{name}.lock", f"{other}.entry", f".{name}.entry.0123abcd.tmp"]
    for link in kept:
        (cache.folder / link).symlink_to(notes)
    folders = [
        f"engine-{'0' * 32}.lock",
        f"engine-{'1' * 32}.entry",
        f".{other}.entry.89abcdef.tmp",
    ]
    for folder in folders:
        (cache.folder / folder).mkdir()
        (cache.folder / folder / "page").write_text("mine")
    kept += [*folders, f".{other}.entry.my-notes.tmp", f"{other}.entry.0123abcd.tmp"]
    for file in kept[-2:]:
        (cache.folder / file).write_text("mine")
    (cache.folder / f"engine-{'2' * 32}.lock").touch()  # the only one that goes besides
    assert get(cache, builder) == builder.engine
    monkeypatch.setenv(LIMIT, "0")
    cache = EngineCache(cache.folder)
    assert [entry.path for entry in cache.prune()] == [cache.path_of(KEY)]
    assert {path.name for path in cache.folder.iterdir()} == {*kept}
    assert notes.read_text() == "mine"
    assert all((cache.folder / folder / "page").read_text() == "mine" for folder in folders)


@pytest.mark.parametrize("text", ["ten", "-1", "nan", ""])
def test_a_limit_that_is_no_size_is_refused(text, monkeypatch):
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(ConfigError, match="expected gigabytes from 0 on"):
        EngineCache()


def test_the_folder_is_that_of_all_caches_unless_another_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPT_CACHE", str(tmp_path))
    assert EngineCache().folder == tmp_path / "engines"
    assert EngineCache(tmp_path / "own").folder == tmp_path / "own"
