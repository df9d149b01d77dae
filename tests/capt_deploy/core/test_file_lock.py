import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from capt_deploy.core.file_lock import file_lock, file_lock_if_free

HOLD = """
import sys, time
from pathlib import Path
from capt_deploy.core.file_lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    """Start a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_threads_come_one_after_the_other(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with file_lock(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_a_killed_process_leaves_a_free_lock(tmp_path):
    path = tmp_path / "lock"
    process = hold(path)
    with file_lock_if_free(path) as free:
        assert not free
    process.kill()
    process.wait()
    with file_lock_if_free(path) as free:
        assert free


def test_who_waits_is_told_once_and_comes_next(tmp_path):
    path, told = tmp_path / "lock", []
    process = hold(path)

    def waiting():
        told.append(process.poll())
        process.terminate()

    with file_lock(path, waiting):
        assert told == [None]
        assert process.wait() == -signal.SIGTERM
    with file_lock(path, waiting):
        assert told == [None]


def test_a_lock_whose_file_was_removed_is_not_held_twice(tmp_path):
    path, second = tmp_path / "lock", threading.Event()

    def wait_for_it():
        with file_lock(path):
            second.set()

    with file_lock(path):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        time.sleep(0.1)  # now it waits for a file that is about to lose its name
        path.unlink()
    thread.join()
    assert second.is_set()
    with file_lock(path), file_lock_if_free(path) as free:
        assert not free


def test_what_is_written_in_the_file_does_not_matter(tmp_path):
    path = tmp_path / "lock"
    path.write_text(str(os.getpid()))  # as other programs mark their locks
    with file_lock_if_free(path) as free:
        assert free
    assert path.read_text() == str(os.getpid())


FORK = """
import os, sys, time
from pathlib import Path
from capt_deploy.core.file_lock import file_lock
with file_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        if sys.argv[2] == "leave":
            os.close(1)
            time.sleep(60)
        sys.exit()  # ends the block, but the lock is its parent's
    if sys.argv[2] == "leave":
        print(os.getpid(), flush=True)
    else:
        os.wait()
        print("held", flush=True)
    if sys.argv[3] == "stay":
        sys.stdin.read()
print("released", flush=True)
sys.stdin.read()
"""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def start_fork(path, *arguments):
    command = [sys.executable, "-c", FORK, path, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    return process, process.stdout.readline()


def becomes_free(path):
    """Tell whether a lock is free soon: a copy needs a moment to close what it has open."""
    for _ in range(100):
        with file_lock_if_free(path) as free:
            if free:
                return True
        time.sleep(0.05)
    return False


@forks
@pytest.mark.parametrize("ends", ["leave", "killed"])
def test_a_forked_copy_that_lives_on_holds_no_lock(tmp_path, ends):
    path = tmp_path / "lock"
    process, _ = start_fork(path, "leave", "stay" if ends == "killed" else "go")
    try:
        if ends == "killed":
            process.kill()
            process.wait()
        else:
            assert process.stdout.readline() == b"released\n"
        assert becomes_free(path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@forks
def test_a_forked_copy_that_ends_leaves_its_parent_the_lock(tmp_path):
    path = tmp_path / "lock"
    process, line = start_fork(path, "end", "stay")
    assert line == b"held\n"
    with file_lock_if_free(path) as free:
        assert not free
    process.communicate(b"")
    assert becomes_free(path)
