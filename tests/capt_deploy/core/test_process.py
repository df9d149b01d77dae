"""After a fork: an error at once, no hang, and a copy that ends as it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capt_deploy.core.errors import BackendError
from capt_deploy.core.process import Process

GOLDEN = Path(__file__).parents[2] / "golden"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# In a process of its own: pytest's has libraries loaded that do not survive a fork.
FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
from capt_deploy import BackendError, Classifier, RuntimeOptions
bundle, photo = sys.argv[1:3]
classifier = Classifier.load(bundle, "onnxruntime-cpu", options=RuntimeOptions(threads=4))
wanted = classifier(photo).label
assert classifier.submit(photo).result().label == wanted
print("parent answers", flush=True)
if os.fork() == 0:
    calls = {
        "call": lambda: classifier(photo), "predict": lambda: classifier.predict([photo] * 3),
        "submit": lambda: classifier.submit(photo), "add": lambda: classifier.add_classes(["x"]),
        "run": lambda: classifier.run(classifier.preprocess(photo)[None]),
        "backend": lambda: classifier.backend.run(classifier.preprocess(photo)[None]),
    }
    for name, call in calls.items():
        try:
            call()
            print(name, "answered", flush=True)
        except BackendError as error:
            print(name, "load it only after the fork, never before it" in str(error), flush=True)
    classifier.close()
    with Classifier.load(bundle, "onnxruntime-cpu") as own:
        print("own", own(photo).label == own.submit(photo).result().label == wanted, flush=True)
    del classifier
    sys.exit(7)
_, status = os.wait()
print("copy ended with", os.waitstatus_to_exitcode(status), flush=True)
assert classifier(photo).label == wanted == classifier.submit(photo).result().label
print("parent still answers", flush=True)
"""


def test_a_forked_copy_gets_an_error_and_the_parent_goes_on() -> None:
    photo = next(iter((GOLDEN / "photos").rglob("*.png")))
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(GOLDEN / "tiny.capt"), str(photo)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "parent answers",
        *(f"{name} True" for name in ("call", "predict", "submit", "add", "run", "backend")),
        "own True",
        "copy ended with 7",
        "parent still answers",
    ]
    assert "Traceback" not in done.stderr


def test_the_error_names_both_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Process()
    own.check()
    monkeypatch.setattr(os, "getpid", lambda: 4)
    with pytest.raises(BackendError, match=r"expected the process \d+ .* copy 4; load it only"):
        own.check()
