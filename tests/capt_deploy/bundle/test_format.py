"""docs/FORMAT.md names every key, file and array of bundles, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle import read
from capt_deploy.bundle.manifest import FileRecord, Graph, Manifest, OpenVocabulary
from capt_deploy.bundle.readme import README
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.data.preprocess import PreprocessConfig
from capt_deploy.verify.reference import ReferenceOutputs

ROOT = Path(__file__).parents[3]
BUNDLES = sorted((ROOT / "tests" / "golden").glob("*.capt"))
TEXT = (ROOT / "docs" / "FORMAT.md").read_text(encoding="utf-8")


def documented(heading: str) -> set[str]:
    """Return the names in the first column of the table under a heading."""
    section = re.split(r"^##", TEXT.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    names = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert names, heading
    return {*names}


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}  # type: ignore[arg-type]


def keys_of(heading: str, record: dict) -> None:
    assert {*record} <= documented(heading), heading


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("## `manifest.json`", Manifest),
        ("### `preprocess`", PreprocessConfig),
        ("### `graphs`", Graph),
        ("### `open_vocabulary`", OpenVocabulary),
        ("### `files`", FileRecord),
    ],
)
def test_the_keys_of_each_object_are_those_of_its_class(heading: str, kind: type) -> None:
    assert documented(heading) == names_of(kind)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_everything_in_the_golden_bundles_is_in_the_document(bundle: Path) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    keys_of("## `manifest.json`", values)
    keys_of("### `preprocess`", values["preprocess"])
    for heading, records in (
        ("### `graphs`", values["graphs"].values()),
        ("### `calibration`", values["calibration"].values()),
        ("### `files`", values["files"].values()),
        ("### `confusion_pairs`", values["confusion_pairs"]),
        ("### `open_vocabulary`", filter(None, [values.get("open_vocabulary")])),
    ):
        for record in records:
            keys_of(heading, record)
    for file in bundle.iterdir():
        assert file.name in documented("## Container")
        if file.suffix == ".safetensors":
            keys_of(f"### `{file.name}`", load_file(file))


def test_every_file_in_the_document_is_in_the_code() -> None:
    fixed = {read.MANIFEST, read.TEXT_EMBEDDINGS, read.CALIBRATION, read.REFERENCE, read.REPORT}
    graphs = {"model.onnx", "model.PRECISION.onnx", "GRAPH.data"}
    text = {OpenVocabulary.file, OpenVocabulary.tokenizer}
    assert documented("## Container") == {*fixed, README, *graphs, *text}


def test_every_array_in_the_document_is_in_the_code() -> None:
    logits = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    arrays = Decisions.from_validation(shares, logits, logits.argmax(axis=1)).arrays()
    expected = {*arrays, "reference.rejection_rate"}
    assert documented("### `calibration.safetensors`") == expected
    answers = Outputs(logits, shares, logits)
    content = ReferenceOutputs((), np.array([0]), answers, answers).save()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert documented("### `reference.safetensors`") == {*header} - {"__metadata__"}
    described = documented("### `text_embeddings.safetensors`")
    assert described == {*re.findall(r"`(\w+)`", read.Bundle.text_embeddings.__doc__ or "")}
