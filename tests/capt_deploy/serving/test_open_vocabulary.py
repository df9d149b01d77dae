"""Classes added to the golden open bundle; `open.json` holds what torch said with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capt_deploy.bundle.manifest import CLEANING_NAMES
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.data.preprocess import preprocess
from capt_deploy.metrics.calibration import softmax
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.open_vocabulary import CLEANINGS, ClassHead, TextEncoder

for library in ("tokenizers", "ftfy"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install .[open-vocab]")

GOLDEN = Path(__file__).parents[2] / "golden"
EXPECTED = json.loads((GOLDEN / "open.json").read_text())
LOGITS = {GOLDEN / "photos" / name: np.array(row) for name, row in EXPECTED["logits"].items()}
PHOTOS = [*LOGITS]
OWN, ADDED = EXPECTED["class_names"][:4], EXPECTED["class_names"][4:]


@pytest.fixture
def classifier() -> Classifier:
    return Classifier.load(GOLDEN / "open.capt")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "open.capt", tmp_path / "copy.capt"))


def test_added_classes_say_what_torch_says(classifier: Classifier) -> None:
    assert [*classifier.class_names] == OWN
    classifier.add_classes(ADDED)
    assert [*classifier.class_names] == EXPECTED["class_names"]
    assert [*classifier.tuned] == EXPECTED["tuned"]
    for photo, logits in LOGITS.items():
        prediction = classifier(photo)
        wanted = softmax(logits[None])[0]
        np.testing.assert_allclose(prediction.probabilities, wanted, atol=1e-5)
        assert prediction.class_names == classifier.class_names
        assert prediction.label == prediction.class_names[int(wanted.argmax())]
        assert prediction.confidence == pytest.approx(max(wanted), abs=1e-5)
        assert prediction.probabilities.dtype == np.float32


def test_logits_are_equal_too_bias_and_all() -> None:
    bundle, classifier = open_bundle(GOLDEN / "open.capt"), Classifier.load(GOLDEN / "open.capt")
    head = ClassHead.from_bundle(bundle, "fp32")
    head = head.with_classes(TextEncoder.from_bundle(bundle), ADDED)
    for photo, logits in LOGITS.items():
        pixels = preprocess(photo, bundle.manifest.preprocess)
        outputs = classifier.backend.run(pixels[None])
        np.testing.assert_allclose(head.logits(outputs.embedding)[0], logits, atol=1e-4)
        np.testing.assert_allclose(outputs.logits[0], logits[:4], atol=1e-4)


def test_one_after_the_other_is_the_same_as_together(classifier: Classifier) -> None:
    for name in ADDED:
        classifier.add_classes([name])
    together = Classifier.load(GOLDEN / "open.capt")
    together.add_classes(name for name in ADDED)
    assert classifier.class_names == together.class_names
    found, wanted = (c(PHOTOS[0]).probabilities for c in (classifier, together))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_predictions_before_and_after_know_their_own_classes(classifier: Classifier) -> None:
    before = classifier(PHOTOS[0])
    classifier.add_classes(ADDED)
    after = classifier(PHOTOS[0])
    assert [*before.class_names] == OWN
    assert len(before.probabilities) == 4
    share = after.probabilities[:4] / after.probabilities[:4].sum()
    np.testing.assert_allclose(share, before.probabilities, atol=1e-5)
    assert len(after.top(6)) == 6


def test_nothing_to_add_changes_nothing(classifier: Classifier) -> None:
    wanted = classifier(PHOTOS[0]).probabilities
    classifier.add_classes([])
    np.testing.assert_allclose(classifier(PHOTOS[0]).probabilities, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["white dog", "red ball"], "'red ball' is there already, as 'red ball'"),
        (["white dog", "Red_Ball"], "'Red_Ball' is there already, as 'red ball'"),
        (["white dog", "White Dog"], "'White Dog' is there already, as 'white dog'"),
        (["white dog", ""], "place 2 is empty"),
        (["white dog", "a boat on a river behind a horse"], "'a boat .* horse' is too long, 1\\d"),
        ("white dog", "expected a list of texts, came 'white dog'"),
        (["white dog", None], "expected a list of texts"),
    ],
)
def test_all_are_added_or_none(classifier: Classifier, names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classifier.add_classes(names)
    assert [*classifier.class_names] == OWN
    classifier.add_classes(ADDED)  # what failed before stands in no way
    assert [*classifier.class_names] == EXPECTED["class_names"]


def test_other_precisions_have_their_own_temperature() -> None:
    bundle = open_bundle(GOLDEN / "open.capt")
    graph, calibration = bundle.manifest.graphs["fp32"], bundle.manifest.calibration["fp32"]
    warmer = {"temperature": 2 * calibration["temperature"]}
    manifest = replace(
        bundle.manifest,
        graphs={"fp32": graph, "fp16": graph},
        calibration={"fp32": calibration, "fp16": warmer},
    )
    both = Bundle(bundle.path, manifest)
    first, second = (ClassHead.from_bundle(both, precision) for precision in ("fp32", "fp16"))
    np.testing.assert_allclose(second.weight, first.weight / 2, rtol=1e-6)
    np.testing.assert_allclose(second.bias, first.bias / 2, rtol=1e-6)
    assert first.bias.any()


def test_many_names_are_embedded_in_parts(classifier: Classifier) -> None:
    names = [f"dog {number}" for number in range(150)]
    texts = TextEncoder.from_bundle(open_bundle(GOLDEN / "open.capt"))
    rows = texts.rows(names)
    assert rows.shape == (150, 32)
    for place in (0, 63, 64, 149):
        np.testing.assert_allclose(rows[place], texts.rows([names[place]])[0], atol=1e-4)


def test_classes_are_added_while_others_predict(classifier: Classifier) -> None:
    wrong: list[str] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            prediction = classifier(PHOTOS[0])
            if len(prediction.class_names) != len(prediction.probabilities):
                wrong.append(prediction.label)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    adders = [threading.Thread(target=classifier.add_classes, args=([n],)) for n in ADDED]
    for thread in adders:
        thread.start()
    for thread in adders:
        thread.join()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(classifier.class_names) == sorted(EXPECTED["class_names"])


def test_bundles_without_a_text_side_say_how_to_get_one() -> None:
    closed = Classifier.load(GOLDEN / "tiny.capt")
    with pytest.raises(BundleError, match=r"tiny\.capt: its classes are fixed; .*--open-vocab"):
        closed.add_classes(["white dog"])
    lone = Classifier.load(GOLDEN / "open.capt" / "model.onnx")
    with pytest.raises(BundleError, match="load the whole bundle"):
        lone.add_classes(["white dog"])


@pytest.mark.parametrize("name", ["text.onnx", "tokenizer.json"])
def test_changed_files_are_not_used(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"{}")
    classifier = Classifier.load(copy)
    with pytest.raises(BundleError, match="is not the file that was exported"):
        classifier.add_classes(["white dog"])
    assert classifier(PHOTOS[0]).label in OWN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "blue"}, "unknown keys .'colour'.; upgrade capt"),
        ({"prompts": ["a photo"]}, "expected prompts with {} for the name"),
        ({"prompts": []}, "expected prompts with {} for the name"),
        ({"prompts": "a photo of a {}."}, "prompts: expected a list"),
        ({"context_length": "16"}, "context_length: expected int, came '16'"),
        ({"tokenizer": "../tokenizer.json"}, "leads out of the bundle"),
        ({"weights": "/etc/passwd"}, "leads out of the bundle"),
    ],
)
def test_records_that_cannot_be_used_are_refused(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content["open_vocabulary"] |= change
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_older_bundles_have_no_record_and_load() -> None:
    assert "open_vocabulary" not in json.loads((GOLDEN / "tiny.capt/manifest.json").read_text())
    assert open_bundle(GOLDEN / "tiny.capt").manifest.open_vocabulary is None


def test_a_zip_is_as_open(tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "open"), "zip", GOLDEN / "open.capt")
    classifier = Classifier.load(archive)
    classifier.add_classes(ADDED)
    wanted = softmax(LOGITS[PHOTOS[0]][None])[0]
    np.testing.assert_allclose(classifier(PHOTOS[0]).probabilities, wanted, atol=1e-5)


@pytest.mark.parametrize("library", ["tokenizers", "ftfy"])
def test_a_missing_library_is_named(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BundleError, match=rf"package {library}: pip install '\.\[open-vocab\]'"):
        classifier.add_classes(ADDED)


def test_torch_is_not_needed(classifier: Classifier) -> None:
    code = f"""
import sys
for name in ("torch", "open_clip", "transformers", "onnx"):
    sys.modules[name] = None
from capt_deploy import Classifier
classifier = Classifier.load({str(GOLDEN / "open.capt")!r})
classifier.add_classes({ADDED})
print(classifier({str(PHOTOS[0])!r}).label)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    classifier.add_classes(ADDED)
    assert done.stdout.strip() == classifier(PHOTOS[0]).label


def test_cleanings_are_open_clips() -> None:
    assert tuple(CLEANINGS) == CLEANING_NAMES
    text = " An_Old\tDog's  \n"
    cleaned = {name: clean(text) for name, clean in CLEANINGS.items()}
    assert cleaned == {
        "whitespace": "An_Old Dog's",
        "lower": "an_old dog's",
        "canonicalize": "an old dogs",
    }
