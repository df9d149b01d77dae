"""The manifest: survives its JSON, and refuses what it does not know."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.bundle.manifest import SCHEMA_VERSION, FileRecord, Graph, Manifest
from capt_deploy.core.errors import BundleError
from capt_deploy.data.preprocess import PreprocessConfig

PREPROCESS = PreprocessConfig((224, 200), (0.48, 0.45, 0.4), (0.27, 0.26, 0.25), fill_color=3)


OPTIONAL = (
    *("files", "verified", "open_vocabulary", "schema_version"),
    *("top_label", "vector_scaling"),
)
CALIBRATION = {"temperature": 1.25, "zero_shot_temperature": 0.5}


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "class_names": ("ape", "käse"),
        "tuned": (True, False),
        "preprocess": PREPROCESS,
        "graphs": {"fp32": Graph("model.onnx", 20), "fp16": Graph("half.onnx", 20)},
        "calibration": {"fp32": CALIBRATION, "fp16": CALIBRATION},
        "confusion_pairs": ({"true": "ape", "predicted": "käse", "count": 3},),
        "training": {"seed": 1, "versions": {"torch": "2.15"}},
        "files": {"model.onnx": FileRecord("ab" * 32, 7)},
    }
    return Manifest(**{**values, **changes})


def as_json(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(manifest().to_dict())), **changes}


def test_a_manifest_survives_its_json() -> None:
    text = json.dumps(manifest().to_dict())
    assert Manifest.from_json(text, "here") == manifest()
    assert Manifest.from_json(text.encode(), "here") == manifest()
    assert list(Manifest.from_json(text, "here").graphs) == ["fp32", "fp16"]


names = st.lists(st.tuples(st.text(), st.booleans()), min_size=1, max_size=6)


@settings(deadline=None)
@given(names, st.floats(1e-9, 1e9))
def test_any_names_and_numbers_survive(classes: list[tuple[str, bool]], temperature: float) -> None:
    wanted = manifest(
        class_names=tuple(name for name, _ in classes),
        tuned=tuple(flag for _, flag in classes),
        calibration={
            precision: {**CALIBRATION, "temperature": temperature} for precision in ("fp32", "fp16")
        },
        confusion_pairs=(),
    )
    assert Manifest.from_json(json.dumps(wanted.to_dict()), "here") == wanted


@pytest.mark.parametrize("other", [{"layout": "NCHW"}, {"dtype": "float32"}])
def test_a_graph_that_takes_other_pixels_is_refused(other: dict[str, str]) -> None:
    values = as_json()
    values["graphs"]["fp32"] |= other
    with pytest.raises(BundleError, match="this reader knows NHWC uint8"):
        Manifest.from_dict(values, "here")


def test_every_graph_needs_its_calibration() -> None:
    with pytest.raises(BundleError, match="of fp16"):
        Manifest.from_dict(as_json(calibration={"fp32": CALIBRATION}), "here")


def test_a_graph_may_say_that_it_is_distance_aware() -> None:
    own = {**CALIBRATION, "distance_aware": True}
    read = Manifest.from_dict(as_json(calibration={"fp32": own, "fp16": CALIBRATION}), "here")
    assert read.calibration["fp32"]["distance_aware"] is True
    for wrong in (False, 1, 0.5, "yes", None):
        own["distance_aware"] = wrong
        message = "distance_aware of fp32: expected true or none|distance_aware: expected float or"
        with pytest.raises(BundleError, match=message):
            Manifest.from_dict(as_json(calibration={"fp32": own, "fp16": CALIBRATION}), "here")


def test_confused_pairs_must_name_the_bundles_own_classes() -> None:
    values = as_json(confusion_pairs=[{"true": "dragon", "predicted": "dragon", "count": 1}])
    with pytest.raises(BundleError, match="unknown classes"):
        Manifest.from_dict(values, "here")


def test_a_graph_needs_no_layout_and_a_lone_model_no_files() -> None:
    graphs = {"fp32": {"file": "model.onnx", "opset": 20}}
    values = as_json(graphs=graphs, calibration={"fp32": CALIBRATION})
    del values["files"]
    read = Manifest.from_dict(values, "here")
    assert read.graphs["fp32"] == Graph("model.onnx", 20, "NHWC", "uint8")
    assert read.files == {}


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION), None])
def test_another_schema_version_is_refused(version: object) -> None:
    with pytest.raises(BundleError, match=f"schema version {version!r}, this reader knows 1"):
        Manifest.from_dict(as_json(schema_version=version), "here")


def test_an_unknown_version_is_blamed_before_its_unknown_keys() -> None:
    with pytest.raises(BundleError, match="schema version 2"):
        Manifest.from_dict(as_json(schema_version=2, later="x"), "here")


@pytest.mark.parametrize("key", [k for k in as_json() if k not in OPTIONAL])
def test_a_missing_key_is_named(key: str) -> None:
    values = as_json()
    del values[key]
    with pytest.raises(BundleError, match=rf"^here: missing keys \['{key}'\]"):
        Manifest.from_dict(values, "here")


PAIR = {"true": "ape", "predicted": "käse"}
TEXTS = {
    **{"prompts": ["a {}"], "context_length": 16, "pad": 0, "cuttable": True},
    "cleaning": "lower",
}
RECORD = {"sha256": "ab", "bytes": 7}
GRAPH = {"file": "model.onnx", "opset": 20}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"extra": 1}, r"unknown keys \['extra'\]; upgrade capt"),
        ({"graphs": {"fp32": {**GRAPH, "engine": "x"}}}, r"fp32: unknown keys \['engine'\]"),
        ({"graphs": {"fp32": {"file": "model.onnx"}}}, r"fp32: missing keys \['opset'\]"),
        ({"graphs": {"fp32": {**GRAPH, "file": 5}}}, "fp32, file: expected str, came 5"),
        ({"graphs": {"fp32": ["file", "opset"]}}, "fp32: expected a JSON object"),
        ({"graphs": {"fp32": None}}, "fp32: expected a JSON object"),
        ({"graphs": []}, "graphs: expected a JSON object"),
        ({"graphs": {}}, "names no graph"),
        ({"files": {"a": {"sha256": "ab"}}}, r"a: missing keys \['bytes'\]"),
        ({"files": {"a": {**RECORD, "sha256": 5}}}, "a, sha256: expected str, came 5"),
        ({"files": {"a": {**RECORD, "bytes": "7"}}}, "a, bytes: expected int, came '7'"),
        ({"files": {"a": {**RECORD, "mode": 0}}}, r"a: unknown keys \['mode'\]"),
        ({"class_names": "ab"}, "class_names: expected a list, came 'ab'"),
        ({"class_names": None}, "class_names: expected a list"),
        ({"class_names": [], "tuned": []}, "one `tuned` flag for each"),
        ({"tuned": [True]}, "one `tuned` flag for each"),
        ({"tuned": "ab"}, "tuned: expected a list"),
        ({"confusion_pairs": {"a": 1}}, "confusion_pairs: expected a list"),
        ({"confusion_pairs": [{**PAIR, "count": -1}]}, "count is -1"),
        ({"confusion_pairs": [{**PAIR, "true": ["ape"]}]}, r"unknown classes \[\"\['ape'\]\"\]"),
        ({"confusion_pairs": [{"true": "ape"}]}, r"unknown classes \['None'\]"),
        ({"confusion_pairs": [{**PAIR, "share": 1}]}, r"unknown keys \['share'\]"),
        ({"files": {"a": RECORD}}, "sha256: expected 64 hexadecimal digits"),
        ({"files": {"a": {"sha256": "ab" * 32, "bytes": -1}}}, "bytes: expected the size"),
        ({"files": {"a": {"sha256": "ab" * 32, "bytes": 2**41}}}, "bytes: expected the size"),
        *(
            ({"calibration": {"fp32": {**CALIBRATION, name: number}, "fp16": CALIBRATION}}, named)
            for name in CALIBRATION
            for number, named in (
                *((-1, "came -1"), (0, "came 0"), (1e-10, "came 1e-10"), (1e10, "came")),
                *((10**400, "came 1000"), (True, "came True"), ("1", f"{name}: expected float")),
            )
        ),
        ({"vector_scaling": {"scales": [1, 1e10], "biases": [0, 0]}}, "scales above 0"),
        ({"vector_scaling": {"scales": [1, 1], "biases": [0, -1e10]}}, "numbers up to 1e"),
        ({"vector_scaling": {"scales": [1], "biases": [0]}}, "a scale for each class"),
        ({"top_label": {"positions": [0], "values": [0], "below": 1e10, "above": 1}}, "up to 1e"),
        *(
            ({"open_vocabulary": {**TEXTS, name: value}}, named)
            for name, value, named in (
                *(("context_length", 0, "context_length"), ("context_length", 2**17, "context")),
                *(("pad", -1, "a pad that is a token"), ("pad", 2**31, "a pad that is a token")),
                *(("logit_bias", 1e10, "logit_bias"), ("cleaning", "soap", "'soap': unknown")),
                ("prompts", ["a"], "prompts with {} for the name"),
            )
        ),
    ],
)
def test_what_is_unknown_or_of_wrong_form_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=f"^here.*{named}"):
        Manifest.from_dict(as_json(**changes), "here")


def test_bad_preprocessing_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match=r"preprocess: missing keys \['mean', 'std'\]"):
        Manifest.from_dict(as_json(preprocess={"size": 224}), "here")
    wrong = {**PREPROCESS.to_dict(), "interpolation": "magic"}
    with pytest.raises(BundleError, match=r"preprocess.*interpolation: expected bicubic, bilinear"):
        Manifest.from_dict(as_json(preprocess=wrong), "here")
    with pytest.raises(BundleError, match="preprocess: expected a JSON object"):
        Manifest.from_dict(as_json(preprocess=5), "here")


NO_JSON = ["", "{", b"\xff\xfe", "[" * 100_000, "nonsense", "1" * 5000, "NaN", "-1e999"]


@pytest.mark.parametrize("text", NO_JSON)
def test_text_that_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(BundleError, match=r"^here: not JSON"):
        Manifest.from_json(text, "here")


def test_half_a_surrogate_pair_is_refused() -> None:
    text = json.dumps(as_json(class_names=["ape", "\ud800"]))
    with pytest.raises(BundleError, match=r"^here: not a text in UTF-8"):
        Manifest.from_json(text, "here")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"^here: expected a JSON object"):
        Manifest.from_json(text, "here")
