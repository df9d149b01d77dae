import hashlib
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.bundle.graphs import (
    HASH_KEY,
    HASHED_KEY,
    has_changed,
    read_metadata,
    read_shapes,
    with_hash,
)
from capt_deploy.bundle.manifest import METADATA_KEY, Manifest

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()


def test_it_reads_what_the_graph_carries() -> None:
    manifest = Manifest.from_json(read_metadata(ONNX) or "", "model.onnx")
    assert manifest.class_names == ("blue sky", "green leaf", "grey stone", "red ball")
    assert manifest.tuned == (True, True, False, False)
    assert manifest.preprocess.size == (16, 16)


def test_it_reads_what_the_onnx_library_reads() -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx library is the oracle")
    model = onnx.load_from_string(ONNX)
    wanted = {entry.key: entry.value for entry in model.metadata_props}[METADATA_KEY]
    assert read_metadata(ONNX) == wanted
    onnx.helper.set_model_props(model, {"author": "x" * 300, METADATA_KEY: "é{}", "z": ""})
    assert read_metadata(model.SerializeToString()) == "é{}"
    onnx.helper.set_model_props(model, {"author": "someone"})
    assert read_metadata(model.SerializeToString()) is None


@pytest.mark.parametrize("data", [b"", b"not a graph at all", b"\xff" * 50, ONNX[:1000]])
def test_what_is_no_onnx_file_has_no_manifest(data: bytes) -> None:
    assert read_metadata(data) is None


def test_damaged_files_give_text_or_nothing_but_never_crash() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(ONNX)
        for place in random.integers(0, len(data), 20):
            data[place] = random.integers(0, 256)
        found = read_metadata(bytes(data[: random.integers(0, len(data))]))
        assert found is None or isinstance(found, str)


def test_shapes_are_those_that_the_onnx_library_reads() -> None:
    assert read_shapes(ONNX) == {
        "images": (None, 16, 16, 3),
        "logits": (None, 4),
        "probabilities": (None, 4),
        "embedding": (None, 32),
    }
    assert read_shapes(b"no graph") == {}
    assert read_shapes(ONNX[:-5]) == {}
    onnx = pytest.importorskip("onnx", reason="the onnx library is the oracle")
    text = ONNX.replace(b"embedding", b"embeddin\xc3")  # no text in UTF-8
    assert read_shapes(text) == {}
    value = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [2, "n", None, 7])
    free = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([], "g", [value], [free])
    model = onnx.helper.make_model(graph).SerializeToString()
    assert read_shapes(model) == {"a": (2, None, None, 7)}


def hashed() -> bytes:
    """Return the committed graph as exports write it now."""
    onnx = pytest.importorskip("onnx", reason="the onnx library writes it")
    model = onnx.load_from_string(ONNX)
    entry = model.metadata_props.add()
    entry.key, entry.value = HASHED_KEY, "at the end"
    return with_hash(model.SerializeToString())


def test_a_hash_is_a_property_like_others() -> None:
    graph = hashed()
    onnx = pytest.importorskip("onnx", reason="the onnx library is the oracle")
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model)
    last = model.metadata_props[-1]
    assert (last.key, last.value) == (HASH_KEY, hashlib.sha256(graph[:-81]).hexdigest())
    assert read_metadata(graph) == read_metadata(ONNX)
    assert read_shapes(graph) == read_shapes(ONNX)


def test_what_was_changed_is_noticed_and_graphs_without_a_hash_are_not_judged() -> None:
    graph = hashed()
    assert not has_changed(graph)
    assert not has_changed(ONNX)
    assert has_changed(graph[:-81])  # its hash is cut off
    assert has_changed(graph + b"\0")
    random = np.random.default_rng(0)
    places = [*random.integers(0, len(graph), 500), *range(len(graph) - 81, len(graph))]
    for place in places:
        changed = bytearray(graph)
        changed[place] ^= 1 << random.integers(8)
        assert has_changed(bytes(changed)), place


def test_numbers_without_an_end_are_no_graph() -> None:
    endless = b"\xff" * 2_000_000
    assert read_metadata(endless) is None  # at once
    assert read_shapes(b"\x3a" + endless) == {}
    assert read_metadata(b"\x00\x01" + ONNX) is None  # a field without a number
