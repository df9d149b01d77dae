"""Bundles that were changed anywhere, with and without new hashes: a typed error or right answers.

`Classifier.load` refuses what cannot be used; neither a prediction nor an added class finds it out.
"""

import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from capt_deploy.bundle.graphs import HASHED_KEY, with_hash
from capt_deploy.bundle.manifest import METADATA_KEY
from capt_deploy.bundle.read import CALIBRATION, MANIFEST, REFERENCE, TEXT_EMBEDDINGS, open_bundle
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.core.errors import BundleError, CaptError
from capt_deploy.metrics.calibration import softmax
from capt_deploy.serving.classifier import Classifier
from capt_deploy.verify.reference import ReferenceOutputs

OPEN = Path(__file__).parents[1] / "golden" / "open.capt"
GRAPH = "model.onnx"
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
Files = dict[str, bytes]
Place = tuple[str | int, ...]


def varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(0x80 | (number & 0x7F))
        number >>= 7
    return bytes([*parts, number])


def with_metadata(onnx: bytes, key: str, value: str) -> bytes:
    """Put a metadata property in front of those of a graph: the first one counts."""
    texts = zip(b"\x0a\x12", (key.encode(), value.encode()), strict=True)
    entry = b"".join(bytes([tag]) + varint(len(text)) + text for tag, text in texts)
    return b"\x72" + varint(len(entry)) + entry + onnx


def hashed(onnx: bytes) -> bytes:
    """Return a graph with its own hash, as exports write it."""
    return with_hash(with_metadata(onnx, HASHED_KEY, "at the end"))


def signed(files: Files, values: dict[str, Any], changed: Place = ()) -> Files:
    """Return the files with this manifest, and hashes that are right, except at a changed place."""
    files = {
        **files,
        GRAPH: with_metadata(files[GRAPH], METADATA_KEY, json.dumps({**values, "files": {}})),
    }
    records = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in files.items()
        if name != MANIFEST
    }
    if changed[:1] == ("files",) and len(changed) > 1:
        records[str(changed[1])] = values["files"][changed[1]]
    return {**files, MANIFEST: json.dumps({**values, "files": records}).encode()}


@pytest.fixture(scope="module")
def whole() -> Files:
    """Return a bundle that has everything but distance-aware calibration."""
    files = {file.name: file.read_bytes() for file in OPEN.iterdir()}
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(60, 4))
    shares = softmax(logits).astype(np.float32)
    scores = Decisions.from_validation(shares, logits, random.integers(0, 4, 60))
    files[CALIBRATION] = save(scores.arrays())
    values = json.loads(files[MANIFEST])
    values["top_label"] = {"positions": [-1.0, 2.0], "values": [-1.0, 2.0], "below": 1, "above": 1}
    values["vector_scaling"] = {"scales": [1.0] * 4, "biases": [0.0] * 4}
    return signed(files, values)


def write(files: Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@contextmanager
def loaded(bundle: Path) -> Iterator[Classifier]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Classifier.load(bundle, "onnxruntime-cpu") as classifier:
            yield classifier


def answer(bundle: Path) -> np.ndarray:
    with loaded(bundle) as classifier:
        return classifier(PIXELS).probabilities


@pytest.fixture(scope="module")
def right(whole: Files, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return answer(write(whole, tmp_path_factory.mktemp("right") / "whole.capt"))


def leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from leaves(item, (*place, key))
        else:
            yield (*place, key)


def changed(value: Any, place: Place, new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


ABSURD = ["x", "", None, -1, 0, 2**63 - 1, 10**30, 10**400, 1e308, 1e-308, float("nan")]


@pytest.mark.parametrize("new", ABSURD, ids=lambda new: repr(new)[:12])
def test_a_signed_manifest_with_an_absurd_value_is_refused_on_loading_or_changes_nothing(
    new: Any, whole: Files, right: np.ndarray, tmp_path: Path
) -> None:
    values = json.loads(whole[MANIFEST])
    for place in leaves(values):
        if place[0] == "training" or place[-1] in (1, 2, 3):
            continue  # free form, and not read; or like the first of a list
        bundle = write(signed(whole, changed(values, place, new), place), tmp_path / "x.capt")
        try:
            with loaded(bundle) as classifier:
                np.testing.assert_array_equal(classifier(PIXELS).probabilities, right, str(place))
                if place[0] != "files" and place != ("open_vocabulary",):
                    classifier.add_classes(["purple cow"])
                    assert np.isfinite(classifier(PIXELS).probabilities).all(), place
        except BundleError as error:
            assert str(bundle) in str(error), place


def test_what_was_not_changed_is_taken(whole: Files, right: np.ndarray, tmp_path: Path) -> None:
    with loaded(write(whole, tmp_path / "x.capt")) as classifier:
        assert classifier(PIXELS).prediction_set
        assert np.array_equal(classifier(PIXELS).probabilities, right)
        classifier.add_classes(["purple cow"])
        assert np.isfinite(classifier(PIXELS).probabilities).all()
    lone = tmp_path / "model.onnx"
    lone.write_bytes(hashed(whole[GRAPH]))
    assert np.array_equal(answer(lone), right)


ARRAYS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "bias of another length": lambda a: a.update(bias=a["bias"][:-1]),
    "bias of one number": lambda a: a.update(bias=a["bias"][0]),
    "bias of two axes": lambda a: a.update(bias=a["bias"][:, None]),
    "bias of integers": lambda a: a.update(bias=a["bias"].astype(np.int64)),
    "bias that is NaN": lambda a: a.update(bias=np.full_like(a["bias"], np.nan)),
    "no bias": lambda a: a.pop("bias"),
    "no rows": lambda a: a.pop("text_embeddings"),
    "rows of another width": lambda a: a.update(text_embeddings=a["text_embeddings"][:, :-1]),
    "too few rows": lambda a: a.update(text_embeddings=a["text_embeddings"][:-1]),
    "rows without axes": lambda a: a.update(text_embeddings=a["bias"][0]),
    "rows of doubles": lambda a: a.update(text_embeddings=a["text_embeddings"].astype(float)),
    "other hand-written rows": lambda a: a.update(zero_shot=a["text_embeddings"][:-1]),
    "rows of tuned classes alone": lambda a: a.update(tuned_rows=a["text_embeddings"][:1, :5]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_signed_rows_of_another_form_are_refused_on_loading(
    kind: str, whole: Files, tmp_path: Path
) -> None:
    arrays = load(whole[TEXT_EMBEDDINGS])
    ARRAYS[kind](arrays)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    files = {**whole, TEXT_EMBEDDINGS: save(arrays)}
    bundle = write(signed(files, json.loads(whole[MANIFEST])), tmp_path / "x.capt")
    with pytest.raises(BundleError, match=rf"x\.capt, {TEXT_EMBEDDINGS}: expected"):
        answer(bundle)


Change = tuple[str, float, int]
SHARES = st.floats(0, 1) | st.floats(0, 0.01) | st.floats(0.99, 1)  # heads and tails are dense
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "zeros", "cut"]),
        SHARES,
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[Change]) -> bytes:
    content = bytearray(data)
    for kind, share, number in changes:
        place = int(share * max(len(content) - 1, 0))
        if kind == "cut":
            del content[place:]
        elif kind == "delete":
            del content[place : place + number]
        elif kind == "insert":
            content[place:place] = bytes([number])
        elif kind == "repeat":
            content[place:place] = content[place : place + number]
        elif kind == "zeros":
            content[place : place + number] = bytes(len(content[place : place + number]))
        elif place < len(content):
            content[place] = number if kind == "set" else content[place] ^ 1 << number % 8
    return bytes(content)


def try_all(bundle: Path) -> np.ndarray | None:
    """Return the answer to one image; None where the bundle is refused, or its text side."""
    try:
        with loaded(bundle) as classifier:
            shares = classifier(PIXELS).probabilities
            if classifier.manifest.open_vocabulary is not None and bundle.suffix != ".onnx":
                classifier.add_classes(["purple cow"])
                assert np.isfinite(classifier(PIXELS).probabilities).all()
            return shares
    except CaptError as error:
        assert str(error)
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None)
@given(st.integers(0, 6), CHANGES)
def test_a_changed_file_is_refused_or_changes_nothing(
    whole: Files, right: np.ndarray, place: Path, number: int, changes: list[Change]
) -> None:
    name = sorted(whole)[number]
    files = {**whole, name: mutated(whole[name], changes)}
    shares = try_all(write(files, place / "x.capt"))
    assert shares is None or np.array_equal(shares, right)


@settings(deadline=None)
@given(st.booleans(), st.sampled_from(["", "x.capt/"]), CHANGES)
def test_a_changed_zip_is_refused_or_changes_nothing(
    whole: Files, right: np.ndarray, place: Path, packed: bool, top: str, changes: list[Change]
) -> None:
    archive = place / "x.zip"
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(archive, "w", method) as file:
        for name, data in whole.items():
            file.writestr(top + name, data)
    archive.write_bytes(mutated(archive.read_bytes(), changes))
    shares = try_all(archive)
    assert shares is None or np.array_equal(shares, right)


@settings(deadline=None)
@given(CHANGES)
def test_a_changed_lone_graph_is_refused_or_changes_nothing(
    whole: Files, right: np.ndarray, place: Path, changes: list[Change]
) -> None:
    lone = place / GRAPH
    lone.write_bytes(mutated(hashed(whole[GRAPH]), changes))
    shares = try_all(lone)
    assert shares is None or np.array_equal(shares, right)


@pytest.mark.parametrize("name", [TEXT_EMBEDDINGS, CALIBRATION, REFERENCE])
@pytest.mark.parametrize("kind", ["BF16", "F16", "F8_E4M3", "U32", "BOOL", "F99"])
def test_arrays_of_other_types_are_refused(
    whole: Files, tmp_path: Path, name: str, kind: str
) -> None:
    end = 8 + int.from_bytes(whole[name][:8], "little")
    header = re.sub(rb'"F(32|64)"', f'"{kind}"'.encode(), whole[name][8:end])
    content = len(header).to_bytes(8, "little") + header + whole[name][end:]
    bundle = write(signed({**whole, name: content}, json.loads(whole[MANIFEST])), tmp_path / "x")
    with pytest.raises(BundleError, match=name):
        answer(bundle)
        ReferenceOutputs.from_bundle(open_bundle(bundle))


SIGNED = (MANIFEST, TEXT_EMBEDDINGS, CALIBRATION, REFERENCE, "tokenizer.json")


@settings(deadline=None)
@given(st.sampled_from(SIGNED), CHANGES)
def test_a_changed_file_with_its_right_hash_is_refused_or_used_without_a_crash(
    whole: Files, place: Path, name: str, changes: list[Change]
) -> None:
    files = {**whole, name: mutated(whole[name], changes)}
    try:
        values = json.loads(files[MANIFEST])
        files = signed(files, values) if isinstance(values, dict) else files
    except (ValueError, RecursionError):
        pass  # no JSON: there is nothing to sign
    bundle = write(files, place / "x.capt")
    shares = try_all(bundle)
    assert shares is None or np.isfinite(shares).all()
    with suppress(CaptError):
        ReferenceOutputs.from_bundle(open_bundle(bundle))
