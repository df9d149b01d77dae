"""Batches of single requests: every answer right, none lost, whatever happens meanwhile."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from capt_deploy import (
    BackendError,
    BatcherOptions,
    BusyError,
    Classifier,
    DecisionOptions,
    ImageError,
)
from capt_deploy.core.errors import ConfigError
from capt_deploy.serving.batcher import Batcher

GOLDEN = Path(__file__).parents[2] / "golden"
PHOTOS = sorted((GOLDEN / "photos").rglob("*.png"))
USUAL = DecisionOptions()
LONG = 60.0  # seconds that nothing takes unless it hangs
HOUR_MS = 3.6e6


class Model:
    """Says of pixels what their first value is; can be held up, and made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.busy = threading.Event()
        self.fail: BaseException | None = None

    def decode(self, image: object) -> np.ndarray:
        if not isinstance(image, bytes | np.ndarray):
            raise ImageError(f"no image: {image}")
        return np.full((1, 1, 3), image[0], np.uint8)

    def run(self, pixels: np.ndarray, _: object) -> list[int]:
        self.busy.set()
        assert self.free.wait(LONG)
        self.batches.append([int(row.flat[0]) for row in pixels])
        if self.fail is not None:
            raise self.fail
        return self.batches[-1]

    def hold(self) -> None:
        self.free.clear()
        self.busy.clear()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(**options: float) -> Batcher:
        made.append(Batcher(model.decode, model.run, BatcherOptions(**options)))
        return made[-1]

    yield make
    model.free.set()
    for own in made:
        own.close()


def image(number: int) -> bytes:
    return bytes([number])


def held_up(model: Model, own: Batcher) -> Future[int]:
    """Let one request run that does not end before the model is free."""
    model.hold()
    first = own.submit(image(255), USUAL)
    assert model.busy.wait(LONG)
    return first


@pytest.fixture(scope="module")
def classifier() -> Iterator[Classifier]:
    with Classifier.load(GOLDEN / "tiny.capt") as own:
        yield own


def sources() -> list[object]:
    """Every kind of image that is taken."""
    opened = Image.open(PHOTOS[1])
    return [str(PHOTOS[0]), PHOTOS[1].read_bytes(), np.asarray(Image.open(PHOTOS[2])), opened]


def test_eight_threads_get_the_right_answer_to_each_of_500_images(classifier: Classifier) -> None:
    kinds = [*sources(), *PHOTOS]
    wanted = [classifier(kind).probabilities for kind in kinds]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = [Random(seed).randrange(len(kinds)) for _ in range(500)]
        for start in range(0, 500, 25):  # 8 x 25 wait at most, fewer than may
            part = order[start : start + 25]
            futures = [classifier.submit(kinds[number]) for number in part]
            for number, future in zip(part, futures, strict=True):
                found = future.result(LONG)
                if not np.allclose(found.probabilities, wanted[number], atol=1e-5):
                    wrong.append(f"{seed}: {number}")
                elif found.label != classifier.class_names[int(np.argmax(wanted[number]))]:
                    wrong.append(f"{seed}: {number} is called {found.label}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_waits_while_the_model_is_busy_runs_together(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_batch=4, max_wait_ms=300)
    first = own.submit(image(255), USUAL)
    assert first.result(LONG) == 255
    held = held_up(model, own)
    futures = [own.submit(image(number), USUAL) for number in range(10)]
    model.free.set()
    assert [future.result(LONG) for future in futures] == list(range(10))
    assert held.result(LONG) == 255
    assert [len(batch) for batch in model.batches[2:]] == [4, 4, 2]


def test_a_full_batch_does_not_wait_for_its_time(batcher: Callable[..., Batcher]) -> None:
    own = batcher(max_batch=3, max_wait_ms=HOUR_MS)
    futures = [own.submit(image(number), USUAL) for number in range(3)]
    assert [future.result(LONG) for future in futures] == [0, 1, 2]


def test_a_lone_request_does_not_wait_for_others(batcher: Callable[..., Batcher]) -> None:
    for wait_ms in (0.0, 1.0, 50.0):
        assert batcher(max_wait_ms=wait_ms).submit(image(7), USUAL).result(LONG) == 7


def test_too_many_are_refused_until_some_are_answered(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_waiting=3, max_wait_ms=0)
    held_up(model, own)
    futures = [own.submit(image(number), USUAL) for number in range(3)]
    for _ in range(2):
        with pytest.raises(BusyError, match="expected at most 3 requests to wait"):
            own.submit(image(9), USUAL)
    model.free.set()
    assert [future.result(LONG) for future in futures] == [0, 1, 2]
    for number in range(20):  # no place was lost
        assert own.submit(image(number), USUAL).result(LONG) == number


def test_a_bad_image_is_an_error_in_its_own_future_alone(classifier: Classifier) -> None:
    bad = [b"no image", "gone.jpg", np.zeros((2, 2), np.float32), "https://example.org/a.jpg"]
    good = [classifier.submit(PHOTOS[0]) for _ in range(3)]
    futures = [classifier.submit(source) for source in bad]
    for future in futures:
        with pytest.raises(ImageError):
            future.result(LONG)
    wanted = classifier(PHOTOS[0]).label
    assert [future.result(LONG).label for future in good] == [wanted] * 3


def test_whatever_decoding_raises_is_the_answer(
    model: Model, batcher: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError("full"), SystemExit("odd"), ValueError("bug")):

        def decode(_: object, error: BaseException = error) -> np.ndarray:
            raise error

        monkeypatch.setattr(model, "decode", decode)
        own = batcher(max_wait_ms=0, max_waiting=1)
        for _ in range(3):
            assert own.submit(image(1), USUAL).exception(LONG) is error


def test_errors_free_their_places(batcher: Callable[..., Batcher]) -> None:
    own = batcher(max_waiting=2, max_wait_ms=0)
    for number in range(10):
        with pytest.raises(ImageError, match="no image"):
            own.submit(f"{number}.jpg", USUAL).result(LONG)
        assert own.submit(image(number), USUAL).result(LONG) == number


def test_a_cancelled_request_is_not_run(model: Model, batcher: Callable[..., Batcher]) -> None:
    own = batcher(max_waiting=4, max_wait_ms=0)
    held = held_up(model, own)
    futures = [own.submit(image(number), USUAL) for number in range(4)]
    assert not held.cancel()  # too late
    assert futures[1].cancel() and futures[3].cancel()
    model.free.set()
    assert futures[0].result(LONG) == 0
    assert futures[2].result(LONG) == 2
    assert not {1, 3} & {number for batch in model.batches for number in batch}
    done = set(as_completed(futures, LONG))  # tells whether those who wait were told
    assert done == set(futures)
    assert own.submit(image(9), USUAL).result(LONG) == 9


def test_what_the_caller_changes_later_does_not_matter(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_wait_ms=0)
    held_up(model, own)
    frame, futures = np.zeros(1, np.uint8), []
    for number in range(5):
        frame[0] = number
        futures.append(own.submit(frame, USUAL))
    model.free.set()
    assert [future.result(LONG) for future in futures] == list(range(5))


def test_one_opened_image_can_be_submitted_twice(classifier: Classifier) -> None:
    wanted = classifier(PHOTOS[1]).probabilities
    opened = Image.open(PHOTOS[1])
    for future in [classifier.submit(opened) for _ in range(20)]:
        np.testing.assert_allclose(future.result(LONG).probabilities, wanted, atol=1e-5)


def test_closing_answers_what_waits_and_takes_nothing_more(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_batch=3, max_wait_ms=HOUR_MS)
    futures = [own.submit(image(number), USUAL) for number in range(50)]
    own.close()
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == list(range(50))
    with pytest.raises(BackendError, match="closed"):
        own.submit(image(1), USUAL)
    own.close()


def test_closing_without_draining_cancels_what_waits(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_wait_ms=0)
    held = held_up(model, own)
    futures = [own.submit(image(number), USUAL) for number in range(5)]
    closing = threading.Thread(target=own.close, kwargs={"drain": False})
    closing.start()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(LONG)
    model.free.set()
    closing.join(LONG)
    assert held.result(LONG) == 255
    assert model.batches == [[255]]


def test_an_answer_may_close_what_gave_it(batcher: Callable[..., Batcher]) -> None:
    own, closed = batcher(max_wait_ms=0), threading.Event()
    future = own.submit(image(3), USUAL)
    future.add_done_callback(lambda _: (own.close(), closed.set()))
    assert closed.wait(LONG)
    own.close()
    assert future.result(LONG) == 3


def test_a_failed_batch_tells_its_own_requests_and_the_next_one_runs(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_batch=2, max_wait_ms=HOUR_MS)
    model.fail = RuntimeError("out of memory")
    futures = [own.submit(image(number), USUAL) for number in range(2)]
    errors = [future.exception(LONG) for future in futures]
    assert all(isinstance(error, BackendError) for error in errors)
    assert all("batch of 2 images failed: out of memory" in str(error) for error in errors)
    assert errors[0] is not errors[1]  # each is raised in another thread
    model.fail = None
    futures = [own.submit(image(number), USUAL) for number in range(2)]
    assert [future.result(LONG) for future in futures] == [0, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_thread_is_told_to_all_who_wait_and_who_come(
    model: Model, batcher: Callable[..., Batcher]
) -> None:
    own = batcher(max_wait_ms=0)
    held = held_up(model, own)
    futures = [own.submit(image(number), USUAL) for number in range(5)]
    model.fail = SystemExit("gone")
    model.free.set()
    for future in (held, *futures):
        with pytest.raises(BackendError, match="gone"):
            future.result(LONG)
    with pytest.raises(BackendError, match=r"has died \(SystemExit: gone\)"):
        own.submit(image(1), USUAL)
    own.close()


def threads_called(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_a_classifier_that_is_dropped_takes_its_threads_along() -> None:
    before = threads_called("capt-")
    own = Classifier.load(GOLDEN / "tiny.capt")
    future, gone = own.submit(PHOTOS[0]), weakref.ref(own)
    del own
    assert future.result(LONG).label
    del future
    for _ in range(100):
        gc.collect()
        if gone() is None and threads_called("capt-") == before:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{gone()}, {threads_called('capt-')} threads instead of {before}")


EXIT = """
import sys
from capt_deploy import BatcherOptions, Classifier
classifier = Classifier.load(sys.argv[1], batcher=BatcherOptions(max_wait_ms=60_000, max_batch=7))
for number in range(40):
    future = classifier.submit(sys.argv[2])
    future.add_done_callback(lambda f: print(f.result().label, flush=True))
"""


def test_what_waits_at_the_interpreters_exit_is_answered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(GOLDEN / "tiny.capt"), str(PHOTOS[0])],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 40
    assert len(set(lines)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_waiting": 0},
        {"max_wait_ms": -1},
        {"max_wait_ms": "nan"},
        {"max_wait_ms": "inf"},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="batcher: expected"):
        BatcherOptions(**{name: float(value) for name, value in options.items()})


MEMORY = """
import os, sys
from collections import deque
from pathlib import Path
from capt_deploy import Classifier

def predict(classifier, photo, times):
    content, waiting = photo.read_bytes(), deque()
    for number in range(times):
        if len(waiting) == 200:
            waiting.popleft().exception()
        waiting.append(classifier.submit("gone.jpg" if number % 50 == 0 else content))
    for future in waiting:
        future.exception()

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

with Classifier.load(sys.argv[1]) as classifier:
    predict(classifier, Path(sys.argv[2]), 5000)
    before = resident()
    predict(classifier, Path(sys.argv[2]), 10000)
    print(resident() / before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory in /proc")
def test_ten_thousand_predictions_take_no_more_memory_than_the_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(GOLDEN / "tiny.capt"), str(PHOTOS[0])],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=True,
    )
    assert float(done.stdout) < 1.01
