"""A bundle is checked by the runtime alone: nothing here needs torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from capt_deploy.backends.base import Outputs
from capt_deploy.core.errors import (
    BackendError,
    BundleError,
    DataError,
    GateError,
    UnavailableError,
)
from capt_deploy.core.files import sha256_file
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.check import check_bundle
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns
from export.cli.export import main

PHOTOS = Path(__file__).parents[2] / "golden" / "photos"


@pytest.fixture
def reference(golden: Path) -> ReferenceOutputs:
    """Return what the committed bundle itself says of the committed photos."""
    classifier = Classifier.load(golden)
    files = sorted(PHOTOS.rglob("*.png"))
    pixels = np.stack([preprocess(file, classifier.manifest.preprocess) for file in files])
    drawn = draw_patterns(classifier.manifest.preprocess.size)
    answers = (classifier.backend.run(batch) for batch in (pixels, drawn))
    digests = tuple(sha256_file(file) for file in files)
    return ReferenceOutputs(digests, np.arange(len(files)), *answers)


def shifted(answers: Outputs) -> Outputs:
    return answers._replace(logits=answers.logits + np.float32(0.01))


def test_a_sound_bundle_passes_on_patterns_and_images(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs
) -> None:
    report = check_bundle(with_reference(reference.save()), PHOTOS)
    own = report["fp32"]
    assert own["patterns"]["passed"] and own["images"]["passed"]
    assert own["images"]["images"] == own["images"]["labelled"] == len(reference.sha256)
    assert own["patterns"]["labelled"] == 0


@pytest.mark.parametrize("kind", ["patterns", "images"])
def test_a_graph_that_says_something_else_is_caught(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs, kind: str
) -> None:
    wrong = replace(reference, **{kind: shifted(getattr(reference, kind))})
    # the rows for tools are compared with what was said of the patterns, before any graph is asked
    said = "text embeddings" if kind == "patterns" else "fp32, images: max logit difference"
    with pytest.raises(GateError, match=said):
        check_bundle(with_reference(wrong.save()), PHOTOS)


def test_another_file_that_was_changed_is_noticed(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs
) -> None:
    bundle = with_reference(reference.save())
    (bundle / "report.json").write_text("{}")
    with pytest.raises(BundleError, match=r"report\.json is not the file that was exported"):
        check_bundle(bundle)


def test_a_graph_that_cannot_be_loaded_is_no_pass(
    with_reference: Callable[[bytes], Path],
    reference: ReferenceOutputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BackendError("cannot load the graph")

    monkeypatch.setattr("capt_deploy.backends.spec.BackendSpec.open", refuse)
    with pytest.raises(BackendError, match="cannot load"):
        check_bundle(with_reference(reference.save()))


def test_an_unknown_backend_is_bad_input(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs
) -> None:
    with pytest.raises(BackendError, match="expected one of") as caught:
        check_bundle(with_reference(reference.save()), backend="foo")
    assert caught.value.exit_code == 2


def test_without_images_the_patterns_are_asked_about(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs
) -> None:
    bundle = with_reference(reference.save())
    assert set(check_bundle(bundle)["fp32"]) == {"patterns"}
    with pytest.raises(DataError, match="none of the 3 images"):
        check_bundle(bundle, Path(__file__).parent)


def test_what_cannot_run_here_is_said_and_is_no_pass(
    with_reference: Callable[[bytes], Path],
    reference: ReferenceOutputs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnavailableError("no such device")

    monkeypatch.setattr("capt_deploy.backends.spec.BackendSpec.open", refuse)
    with pytest.raises(UnavailableError, match="none of its graphs can run here"):
        check_bundle(with_reference(reference.save()))
    assert "fp32: not checked: no such device" in capsys.readouterr().err


def test_the_command_checks_and_writes_nothing(
    with_reference: Callable[[bytes], Path], reference: ReferenceOutputs
) -> None:
    bundle = with_reference(reference.save())
    before = sorted((f.name, f.stat().st_mtime_ns) for f in bundle.iterdir())
    done = CliRunner().invoke(main, ["--check", str(bundle), "--gate-data", str(PHOTOS), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["fp32"]["images"]["passed"] is True
    assert "fp32, images" in done.stderr
    assert sorted((f.name, f.stat().st_mtime_ns) for f in bundle.iterdir()) == before
    for other in (["run"], ["--int8"], ["--triton", "x"], ["--opset", "20"]):
        wrong = CliRunner().invoke(main, ["--check", str(bundle), *other])
        assert wrong.exit_code == 2 and "writes nothing" in wrong.stderr
