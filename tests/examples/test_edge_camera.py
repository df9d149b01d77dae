"""The edge camera as a process, over a folder that is filled while it runs."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from capt_deploy.serving.classifier import Classifier
from examples.edge_camera import main, watched
from tests.conftest import COLOURS

ROOT = Path(__file__).parents[2]
SECONDS = 30


@dataclass
class Camera:
    process: subprocess.Popen[str]
    log: Path

    def line(self) -> dict[str, Any]:
        """Return the next line; waits for it."""
        assert self.process.stdout
        text = self.process.stdout.readline()
        assert text.endswith("\n"), self.log.read_text()
        line: dict[str, Any] = json.loads(text)
        return line

    def end(self, kind: signal.Signals = signal.SIGINT) -> list[dict[str, Any]]:
        """Return the lines that are left once it has ended, as it should."""
        self.process.send_signal(kind)
        rest, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        return [json.loads(line) for line in rest.splitlines()]


@contextmanager
def running(golden: Path, source: Path, *options: str) -> Iterator[Camera]:
    """Start a camera and wait until it is ready."""
    log = source.parent / "camera.log"
    command = [sys.executable, "-m", "examples.edge_camera", str(golden), str(source), *options]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=sink, text=True
        )
    try:
        deadline = time.monotonic() + SECONDS
        while "Ctrl-C ends" not in log.read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        yield Camera(process, log)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def lasting(camera: Camera) -> Iterator[None]:
    """End the process after a while, so that waiting for its lines fails instead of hanging."""
    timer = threading.Timer(SECONDS, camera.process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def picture(number: int) -> Image.Image:
    colour = list(COLOURS.values())[number % 4]
    random = np.random.default_rng(number)
    return Image.fromarray(random.normal(colour, 50, (24, 30, 3)).clip(0, 255).astype(np.uint8))


def put(folder: Path, name: str, number: int) -> Path:
    """Let a whole picture appear in a folder at once."""
    hidden = folder.parent / f"of {name}"
    picture(number).save(hidden, "PNG")
    return hidden.rename(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of one old frame and something else."""
    made = tmp_path / "frames"
    made.mkdir()
    put(made, "old.png", 99)
    (made / "notes.txt").write_text("no frame")
    return made


def test_each_new_frame_gets_a_line_with_what_the_classifier_says(
    golden: Path, folder: Path, classifier: Classifier
) -> None:
    with running(golden, folder, "--watch", "--threshold", "0.35") as camera:
        sure = set()
        for number in range(6):
            path = put(folder, f"{number}.png", number)
            line, own = camera.line(), classifier(path)
            assert line.pop("latency_ms") > 0
            unsure = own.confidence < 0.35
            assert line == {
                "frame": path.name,
                "label": own.label,
                "confidence": pytest.approx(own.confidence, abs=2e-4),
                "unsure": unsure,
                "dropped": 0,
            }
            sure.add(unsure)
        assert sure == {True, False}
        assert camera.end() == []
        assert camera.log.read_text().endswith("6 frames labelled, 0 dropped\n")


def test_frames_that_come_too_fast_are_dropped_and_counted(golden: Path, folder: Path) -> None:
    with running(golden, folder, "--watch", "--settle-ms", "300") as camera:
        for number in range(40):
            put(folder, f"{number:02}.png", number)
        lines = [camera.line()]
        while lines[-1]["frame"] != "39.png":
            lines.append(camera.line())
        lines += camera.end(signal.SIGTERM)
    assert len(lines) + sum(line["dropped"] for line in lines) == 40
    assert len(lines) < 40
    names = [line["frame"] for line in lines]
    assert names == sorted({*names})


def test_a_file_that_is_overwritten_is_a_source_too(
    golden: Path, folder: Path, classifier: Classifier
) -> None:
    with running(golden, folder, "--watch") as camera:
        for number in range(3):
            path = put(folder, "latest.png", number)
            line = camera.line()
            assert (line["frame"], line["label"]) == ("latest.png", classifier(path).label)
        camera.end()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_is_overwritten_faster_than_it_settles_is_seen(
    golden: Path, folder: Path, in_place: bool
) -> None:
    pictures = [put(folder.parent, f"{number}.png", number).read_bytes() for number in range(4)]
    ended = threading.Event()

    def film() -> None:
        for number in itertools.count():
            if ended.wait(0.01):
                return
            if in_place:
                (folder / "latest.png").write_bytes(pictures[number % 4])
            else:
                put(folder, "latest.png", number)

    with running(golden, folder, "--watch", "--settle-ms", "200") as camera:
        with lasting(camera), ThreadPoolExecutor(1) as pool:
            filming = pool.submit(film)
            try:
                lines = [camera.line() for _ in range(5)]
            finally:
                ended.set()
            filming.result()
        lines += camera.end()
    assert {line["frame"] for line in lines} == {"latest.png"}
    assert in_place or all("label" in line for line in lines)
    assert any("label" in line for line in lines)


def test_new_files_that_each_settle_are_not_taken_before(tmp_path: Path) -> None:
    frames = watched(tmp_path, stop=False, settle_seconds=0.15)  # type: ignore[arg-type]
    ended = threading.Event()

    def fill() -> None:
        for number in itertools.count():
            (tmp_path / f"{number:05}.png").touch()
            if ended.wait(0.02):
                return

    with ThreadPoolExecutor(1) as pool:
        pool.submit(fill)
        try:
            ages = []
            for _ in range(10):
                name = next(frames).name
                ages.append(time.time() - (tmp_path / name).stat().st_ctime)
        finally:
            ended.set()
    assert min(ages) >= 0.15


def test_a_file_is_not_read_half_written_and_a_broken_one_harms_nobody(
    golden: Path, folder: Path
) -> None:
    whole = put(folder.parent, "whole.png", 5).read_bytes()
    with running(golden, folder, "--watch", "--settle-ms", "400") as camera:
        with (folder / "slow.png").open("wb") as file:
            for start in range(0, len(whole), len(whole) // 4):
                file.write(whole[start : start + len(whole) // 4])
                file.flush()
                time.sleep(0.05)
        assert "label" in camera.line()
        (folder / "broken.png").write_bytes(whole[:200])
        broken = camera.line()
        assert {*broken} == {"frame", "error", "latency_ms", "dropped"}
        put(folder, "next.png", 6)
        assert camera.line()["frame"] == "next.png"
        assert camera.end() == []


def test_a_recorded_folder_is_labelled_whole_or_at_its_own_speed(
    golden: Path, tmp_path: Path
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(60):
        put(frames, f"{number:02}.png", number)
    all_of_them = CliRunner().invoke(main, [str(golden), str(frames)])
    assert all_of_them.exit_code == 0
    lines = [json.loads(line) for line in all_of_them.stdout.splitlines()]
    assert [line["frame"] for line in lines] == [f"{number:02}.png" for number in range(60)]
    fast = CliRunner().invoke(main, [str(golden), str(frames), "--fps", "5000"])
    lines = [json.loads(line) for line in fast.stdout.splitlines()]
    assert len(lines) + sum(line["dropped"] for line in lines) == 60
    assert len(lines) < 60
    assert lines[-1]["frame"] == "59.png"


def test_watching_takes_no_memory_for_what_was_there(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:05}.png").touch()
    frames = watched(tmp_path, stop=False, settle_seconds=0.0)  # type: ignore[arg-type]
    peaks = []
    for name in ("first.png", "second.png"):  # the first one also imports things
        time.sleep(0.05)
        (tmp_path / name).touch()
        tracemalloc.start()
        assert next(frames).name == name
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 100_000, "bytes; the names alone of these files take more"


def test_a_video_is_labelled_at_its_own_speed(golden: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (30, 24))
    for number in range(25):
        writer.write(np.asarray(picture(number))[:, :, ::-1].copy())
    writer.release()
    result = CliRunner().invoke(main, [str(golden), str(film)])
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) + sum(line["dropped"] for line in lines) == 25
    assert all("label" in line for line in lines)


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("nowhere", ["--watch"], "--watch expects a folder"),
        (".", [], "expected images, found none"),
    ],
)
def test_a_source_that_is_none_is_an_error_of_one_line(
    golden: Path, tmp_path: Path, source: str, options: list[str], reason: str
) -> None:
    result = CliRunner().invoke(main, [str(golden), str(tmp_path / source), *options])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_without_opencv_the_fix_is_named(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = CliRunner().invoke(main, [str(golden), "0"])
    assert result.exit_code == 2
    assert "pip install opencv-python-headless" in result.stderr
