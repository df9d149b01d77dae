import os
import signal
import subprocess
import sys
import threading
import time

from capt_deploy.file_lock import file_lock, file_lock_if_free

HOLD = """
import sys, time
from pathlib import Path
from capt_deploy.file_lock import file_lock
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
