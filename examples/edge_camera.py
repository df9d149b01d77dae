"""Label what a camera sees, on a small machine: one thread, bounded memory, never behind.

    python -m examples.edge_camera pets.capt frames/ --watch

A JSON line for each frame:

    {"frame": "7.jpg", "label": "cat", "confidence": 0.93, "unsure": false, …, "dropped": 3}

`dropped` frames came since the line before and were skipped: an answer about the present is worth
more than late answers about everything. A frame that cannot be read has an "error".
"""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from capt_deploy.core.console import Command, PathInHome, say
from capt_deploy.core.errors import ConfigError, DataError, ImageError

if TYPE_CHECKING:
    from capt_deploy.data.images import ImageInput
    from capt_deploy.serving.classifier import Classifier

_ENDING = (signal.SIGINT, signal.SIGTERM)
_USUAL_FPS = 30.0  # of cameras that do not say


class Frame(NamedTuple):
    """One image of the source."""

    name: str
    image: "ImageInput"
    dropped: int  # frames passed over right before it


class Stop:
    """True once Ctrl-C or SIGTERM has come within its context; the frame is still finished.

    A second signal ends the program at once, in case the source hangs.
    """

    def __init__(self) -> None:
        self._stopping = False

    def __bool__(self) -> bool:
        return self._stopping

    def __enter__(self) -> "Stop":
        self._before = [(kind, signal.signal(kind, self._stop)) for kind in _ENDING]
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before:
            signal.signal(kind, handler)

    def _stop(self, kind: int, _: FrameType | None) -> None:
        self._stopping = True
        signal.signal(kind, signal.SIG_DFL)


def watched(folder: Path, stop: Stop, settle_seconds: float) -> Iterator[Frame]:
    """Yield the newest image of a folder whenever there is a newer one.

    An image is new if it was written or moved there since the last one; a single file that is
    overwritten again and again is a source, too. It is taken once it has not changed for
    `settle_seconds`, as it may be half written, or once everything new has kept changing for that
    long. Overwritten images are not counted. Memory does not grow with the folder.
    """
    last = max(_images(folder), default=(0, ""))
    return _newer(folder, last, stop, settle_seconds)


def _newer(folder: Path, last: tuple[int, str], stop: Stop, settle: float) -> Iterator[Frame]:
    restless: float | None = None  # time since which new files keep changing
    while not stop:
        settled = (time.time_ns() - int(settle * 1e9), "")
        newest, changing, arrived, start = last, last, 0, time.monotonic()
        for image in _images(folder):
            changing = max(changing, image)
            if last < image <= settled:
                arrived, newest = arrived + 1, max(newest, image)
        if not arrived and last < changing <= (
            time.time_ns(),
            "",
        ):  # not in the future: clocks jump
            restless, newest = restless or time.monotonic(), changing
            arrived = int(start - restless > settle)
        if not arrived:
            time.sleep(max(0.01, time.monotonic() - start))  # a large folder takes long to list
            continue
        last, restless = newest, None
        yield Frame(last[1], folder / last[1], arrived - 1)


def _images(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield when each image of a folder came there, in ns, and its name."""
    from capt_deploy.data.images import IMAGE_SUFFIXES

    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.lower().endswith(tuple(IMAGE_SUFFIXES)) and entry.is_file()):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # taken away meanwhile
                continue
            # st_ctime: of the last change or move, by this machine's clock; elsewhere of creation.
            came = status.st_ctime_ns if os.name == "posix" else status.st_mtime_ns
            yield came, entry.name


def recorded(folder: Path, stop: Stop, fps: float | None) -> Iterator[Frame]:
    """Yield a folder's images by name: all of them, or as a camera of `fps` would show them."""
    names = sorted(name for _, name in _images(folder))
    if not names:
        raise DataError(f"{folder}: expected images, found none; --watch waits for some")
    start, number, shown = time.monotonic(), 0, 0
    while number < len(names) and not stop:
        if fps is not None:
            time.sleep(max(0.0, start + number / fps - time.monotonic()))
            number = max(number, min(int((time.monotonic() - start) * fps), len(names) - 1))
        yield Frame(names[number], folder / names[number], number - shown)
        number = shown = number + 1


def filmed(source: str, stop: Stop) -> Iterator[Frame]:
    """Yield frames of a camera (its number or URL) or of a video file, at its own speed.

    Raises ConfigError where OpenCV is not installed, DataError where it cannot open the source.
    """
    if find_spec("cv2") is None:
        raise ConfigError(f"{source}: no folder; films need pip install opencv-python-headless")
    import cv2  # type: ignore[import-not-found, unused-ignore]

    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        raise DataError(f"{source}: expected a camera or a video; OpenCV cannot open it")
    live = not Path(source).is_file()
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver obeys
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps <= 1000 else _USUAL_FPS
    start, number = time.monotonic(), 0
    while not stop:
        if not live:
            time.sleep(max(0.0, start + number / fps - time.monotonic()))
        late = int((time.monotonic() - start) * fps) - number
        dropped = _grab(capture, late, fps, live)
        if dropped is None:
            break
        number += dropped + 1
        seen, pixels = capture.retrieve()  # (height, width, 3) BGR
        if live:  # nobody knows how many frames it has thrown away itself
            start, number = time.monotonic(), 0
        if seen:
            yield Frame(str(number), pixels[:, :, ::-1].copy(), dropped)
    capture.release()


def _grab(capture: Any, late: int, fps: float, live: bool) -> int | None:
    """Take the next frame after skipping `late` ones; return how many, None at the end."""
    dropped = 0
    while True:
        start = time.monotonic()
        if not capture.grab():
            return None
        waited = time.monotonic() - start > 0.25 / fps  # the camera had no older one left
        if dropped >= late or (live and waited):
            return dropped
        dropped += 1


def print_lines(
    classifier: "Classifier", frames: Iterable[Frame], threshold: float
) -> tuple[int, int]:
    """Print each frame's line; return how many frames were labelled, and how many dropped."""
    labelled, dropped = 0, 0
    for frame in frames:
        start = time.perf_counter()
        line: dict[str, Any] = {"frame": frame.name}
        try:
            prediction = classifier(frame.image)
            line |= {"label": prediction.label, "confidence": round(prediction.confidence, 4)}
            line["unsure"] = prediction.confidence < threshold
        except ImageError as error:
            line["error"] = str(error)
        spent_ms = round((time.perf_counter() - start) * 1000, 2)
        line |= {"latency_ms": spent_ms, "dropped": frame.dropped}
        click.echo(json.dumps(line, ensure_ascii=False))  # which also flushes
        labelled, dropped = labelled + ("label" in line), dropped + frame.dropped
    return labelled, dropped


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome())
@click.argument("source")
@click.option("--watch", is_flag=True, help="SOURCE is a folder that is being filled.")
@click.option(
    "--fps", type=click.FloatRange(0, min_open=True), help="Speed at which to show a folder."
)
@click.option(
    "--settle-ms",
    default=30.0,
    show_default=True,
    help="With --watch: wait until a file is at rest.",
)
@click.option("--threshold", default=0.5, show_default=True, help="Below it: unsure.")
@click.option("--backend", default="auto", show_default=True, help="As for capt-predict.")
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads."
)
@click.option("--fast-decode", is_flag=True, help="Read large JPEGs at a lower resolution.")
def main(
    bundle: Path,
    source: str,
    watch: bool,
    fps: float | None,
    settle_ms: float,
    threshold: float,
    backend: str,
    threads: int,
    fast_decode: bool,
) -> None:
    """Label the frames of SOURCE with a BUNDLE, a JSON line each, until Ctrl-C.

    SOURCE is a folder of frames, or with OpenCV a video file, a camera's number or its URL.

    \b
    Example:
      python -m examples.edge_camera pets.capt frames/ --watch --threshold 0.7
      python -m examples.edge_camera pets.capt 0
    """
    import numpy as np

    from capt_deploy import RuntimeOptions
    from capt_deploy.serving.classifier import Classifier

    folder = Path(source)
    if watch and not folder.is_dir():
        raise DataError(f"{source}: --watch expects a folder")
    options = RuntimeOptions(threads=threads)
    classifier = Classifier.load(bundle, backend, options=options, fast_decode=fast_decode)
    with classifier, Stop() as stop:
        classifier(np.zeros((8, 8, 3), np.uint8))  # a backend's first run is its slowest
        frames = recorded(folder, stop, fps) if folder.is_dir() else filmed(source, stop)
        if watch:
            frames = watched(folder, stop, settle_ms / 1000)
        say(f"{classifier.backend.name} on {classifier.backend.device}; Ctrl-C ends")
        labelled, dropped = print_lines(classifier, frames, threshold)
    say(f"{labelled} frames labelled, {dropped} dropped")


if __name__ == "__main__":
    main()
